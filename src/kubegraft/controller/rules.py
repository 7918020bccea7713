"""CEL rules: what holds between fields, and what may not change, each with a message that says how to fix it.

The rules of one stage repeat what the `__post_init__` of its dataclass in `kubegraft.config` refuses, so that
`kubectl apply` says it at once. They stand at `spec`: there defaults are filled in before a rule is evaluated, while at
the stage they would be evaluated on its own default, an empty object.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kubegraft.config import ADAMW_FIELDS, AUTO, AUTO_NAME

RESERVED: Final = ("budget", "search", "promotion")
_UNAUGMENTED: Final = f"self.augmentation in ['{AUTO_NAME}', 'none']"
# Fields of AdamW that are whole numbers in the schema; the others are compared as doubles.
_WHOLE: Final = frozenset({"num_epochs", "patience"})


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Attributes:
        expression: CEL over `self` (and `oldSelf`: then it is checked at updates only).
        message: What is wrong and how to fix it.
        field: Field that the message is about, relative to where the rule stands: `.solver`; "" for that place.
    """

    expression: str
    message: str
    field: str = ""

    def manifest(self) -> dict[str, Any]:
        """Return it as `x-kubernetes-validations` has it."""
        place = {"fieldPath": self.field} if self.field else {}
        return {"rule": self.expression, "message": self.message, **place}


def rule(expression: str, message: str, field: str = "") -> Rule:
    """Return a rule; see `Rule`."""
    return Rule(expression, message, field)


def _unused_with_lbfgs() -> Iterable[Rule]:
    for name in ADAMW_FIELDS:
        auto = AUTO if name in _WHOLE else float(AUTO)
        yield rule(
            f"self.solver != 'lbfgs' || self.{name} == {auto}",
            f"`{name}` must be {AUTO} with solver 'lbfgs', which solves for the head and has no epochs. "
            "Remove it, or use solver: adamw.",
            f".{name}",
        )


STAGE_RULES: Final[Mapping[str, tuple[Rule, ...]]] = {
    "ingest": (
        rule(
            "self.source.contains('://') || self.source.startsWith('/')",
            "`source` must be a URI (gs://, s3://, https://, sample://) or an absolute path in the pods, such as "
            "/artifacts/photos on the claim of `artifacts`.",
            ".source",
        ),
    ),
    "head": (
        rule(
            "self.weights in ['imagenet', 'none'] || self.weights.contains('://') || self.weights.startsWith('/')",
            "`weights` must be 'imagenet', 'none', a URI, or an absolute path in the pods, such as "
            "/artifacts/backbone.weights.h5.",
            ".weights",
        ),
        rule(
            "self.head != 'mlp' || self.hidden_units.size() > 0",
            "`hidden_units` must list the sizes of the hidden layers of an 'mlp' head. For a head without hidden "
            "layers use head: linear.",
            ".hidden_units",
        ),
        rule(
            f"self.search_seconds == 0.0 || ({_UNAUGMENTED} && self.solver == '{AUTO_NAME}')",
            "`search_seconds` must be 0 where training images are augmented or the solver is set. Use "
            "augmentation: none and solver: auto, or search_seconds: 0.",
            ".search_seconds",
        ),
        *_unused_with_lbfgs(),
        rule(
            "self.solver != 'lbfgs' || self.weight_decay != 0.0",
            "`weight_decay` must be above 0 with solver 'lbfgs': without it the best kernel may be infinite. Leave it "
            "at -1 to have it chosen on validation.",
            ".weight_decay",
        ),
        rule(
            f"self.solver != 'lbfgs' || (self.head == 'linear' && {_UNAUGMENTED})",
            "`solver` must not be 'lbfgs' unless the head is linear and images are not augmented. Use solver: auto.",
            ".solver",
        ),
    ),
    "fine_tune": (
        rule(
            f"self.num_blocks == {AUTO} || self.unfreeze_fraction == {float(AUTO)}",
            "`num_blocks` and `unfreeze_fraction` say the same thing, so only one may be given. Leave one at -1.",
            ".unfreeze_fraction",
        ),
    ),
}

_BUCKET_OR_VOLUME: Final = (
    "startsWith('gs://') || self.{0}.startsWith('s3://') || self.{0}.startsWith('/artifacts/')"
)


def _of_stage(stage: str, each: Rule) -> Rule:
    """Return a stage's rule as it stands at `spec`."""
    return Rule(each.expression.replace("self.", f"self.{stage}."), each.message, f".{stage}{each.field}")


JOB_RULES: Final[tuple[Rule, ...]] = (
    *(_of_stage(stage, each) for stage, rules in STAGE_RULES.items() for each in rules),
    *(
        rule(f"!has(self.{name})", f"`{name}` is reserved for a later version; remove it.")
        for name in RESERVED
    ),
    rule(
        "self.accelerators.count > 0 || self.accelerators.resource == 'nvidia.com/gpu'",
        "`accelerators.resource` names what each node must have, and `accelerators.count` is 0. Set the count, or "
        "remove the resource.",
        ".accelerators.count",
    ),
    rule(
        "!has(self.resources) || !has(self.resources.limits) || "
        "!(self.accelerators.resource in self.resources.limits)",
        "`resources` must not name the accelerator: `accelerators.count` says how many each node gives.",
        ".resources.limits",
    ),
    rule(
        "!has(self.resources) || !has(self.resources.requests) || "
        "!(self.accelerators.resource in self.resources.requests)",
        "`resources` must not name the accelerator: `accelerators.count` says how many each node gives.",
        ".resources.requests",
    ),
    rule(
        "!has(self.resources) || !has(self.resources.requests) || !has(self.resources.limits) || "
        "self.resources.requests.all(name, !(name in self.resources.limits) || "
        "quantity(string(self.resources.requests[name]))"
        ".compareTo(quantity(string(self.resources.limits[name]))) <= 0)",
        "`resources.requests` must not be above `resources.limits`, or no pod could be made. Raise the limit.",
        ".resources.requests",
    ),
    rule(
        "!has(self.cache) || !(has(self.cache.claim) && has(self.cache.uri))",
        "`cache` must have a claim or a uri, not both: there is one feature cache. Remove one.",
        ".cache",
    ),
)


def immutable(names: Iterable[str]) -> list[Rule]:
    """Return a rule for each property that may not be added, changed or removed once the object is there."""
    return [
        rule(
            f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})",
            f"`{name}` can't change once the job exists. Delete the TransferJob and create it anew, or create one of "
            "another name.",
            f".{name}",
        )
        for name in names
    ]


def while_suspended(names: Iterable[str]) -> list[Rule]:
    """Return a rule for each property that may change only where the job was suspended before."""
    return [
        rule(
            f"oldSelf.suspend || (has(self.{name}) == has(oldSelf.{name}) && "
            f"(!has(self.{name}) || self.{name} == oldSelf.{name}))",
            f"`{name}` can change only while the job is suspended. Set suspend: true first, then change it.",
            f".{name}",
        )
        for name in names
    ]
