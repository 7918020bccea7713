"""Stage `export`: a trained model in the form that servers load, with the proof that it answers the same.

model.keras         probabilities of `uint8` pixels of any size; class names inside
saved_model/        class names and probabilities of the bytes of image files
model.json          where the model comes from, and how it did on the test split
verification.json   how far the answers were off in a fresh process
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kubegraft import __version__
from kubegraft.config import ExportConfig
from kubegraft.data.manifest import Manifest, load_manifest
from kubegraft.errors import ExportError
from kubegraft.reporting.events import log_event
from kubegraft.stage import Outcome, StageResult, Workspace, read_result, run_stage, write_atomically

SAVED_MODEL_DIR: Final = "saved_model"
KERAS_FILE: Final = "model.keras"
METADATA_FILE: Final = "model.json"
VERIFICATION_FILE: Final = "verification.json"


def export(
    dataset_dir: str | os.PathLike[str],
    model_dir: str | os.PathLike[str],
    evaluation_dir: str | os.PathLike[str] | None,
    output_dir: str | os.PathLike[str],
    config: ExportConfig,
) -> StageResult:
    """Write an export directory, and prove in a fresh process that it answers like the model.

    Args:
        dataset_dir: Output of `ingest`; its images are the questions.
        model_dir: Output of `train_head` or `fine_tune`.
        evaluation_dir: Output of `evaluate` on this model; its metrics travel with the export. None if the
            model was not evaluated.
        output_dir: Directory to make.
        config: Which formats, and how alike.

    Returns:
        The result; its metrics hold `<format>_max_difference`.

    Raises:
        ExportError: If a format can't be written or does not answer alike, or the evaluation is of another
            model. Nothing is published then.
        DataError: If the dataset can't be read.
        ModelError: If the model can't be read.
    """
    manifest = load_manifest(dataset_dir)
    inputs = {"dataset": read_result(dataset_dir).digest, "model": read_result(model_dir).digest}
    evaluation: dict[str, float] = {}
    if evaluation_dir is not None:
        result = read_result(evaluation_dir)
        _require_same_model(result, inputs["model"])
        inputs["evaluation"], evaluation = result.digest, dict(result.metrics)

    def body(workspace: Workspace) -> Outcome:
        task = _Export(Path(dataset_dir), Path(model_dir), manifest, config, inputs, evaluation)
        return task.write(workspace)

    return run_stage("export", output_dir, inputs=inputs, config=config, body=body)


@dataclass(frozen=True, slots=True)
class _Export:
    """One export, from the trained model to the proved files."""

    dataset_dir: Path
    model_dir: Path
    manifest: Manifest
    config: ExportConfig
    inputs: dict[str, str]
    evaluation: dict[str, float]

    def write(self, workspace: Workspace) -> Outcome:
        """Write and verify everything in the workspace."""
        import tensorflow as tf

        from kubegraft import tensorflow_setup
        from kubegraft.modeling.classifier import load_classifier

        tensorflow_setup.setup(self.config.seed)
        tf.config.experimental.enable_tensor_float_32_execution(False)  # as the fresh process does
        loaded = load_classifier(self.model_dir)
        metadata = {**loaded.metadata, "evaluation": self.evaluation, "inputs": self.inputs}
        self._write_formats(workspace.staging, loaded.model, metadata)
        verification = self._verify(workspace, loaded.model, metadata["classes"])
        text = json.dumps(verification, indent=2) + "\n"
        write_atomically(workspace.staging / VERIFICATION_FILE, text)
        return self._outcome(verification)

    def _write_formats(self, directory: Path, model: Any, metadata: dict[str, Any]) -> None:
        from kubegraft.export.saved_model import write_saved_model
        from kubegraft.modeling.classifier import save_classifier

        if "keras" in self.config.formats:
            save_classifier(model, directory, metadata)
        if "saved_model" in self.config.formats:
            write_saved_model(model, metadata["classes"], directory / SAVED_MODEL_DIR)
        text = json.dumps(metadata, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        write_atomically(directory / METADATA_FILE, text)
        log_event("export", "written", formats=",".join(self.config.formats))

    def _verify(self, workspace: Workspace, model: Any, classes: list[str]) -> dict[str, Any]:
        from kubegraft.export.verification import Exported, choose_images, expected_answers, verify

        images = choose_images(self.dataset_dir, self.manifest, self.config.num_verification_images)
        exported = Exported(
            saved_model=self._path(workspace, "saved_model", SAVED_MODEL_DIR),
            keras=self._path(workspace, "keras", KERAS_FILE),
            classes=classes,
        )
        return verify(
            exported,
            images,
            lambda: expected_answers(model, images),
            tolerance=self.config.tolerance,
            scratch=workspace.scratch,
        )

    def _path(self, workspace: Workspace, name: str, file_name: str) -> Path | None:
        return workspace.staging / file_name if name in self.config.formats else None

    def _outcome(self, verification: dict[str, Any]) -> Outcome:
        formats = {name: each["max_difference"] for name, each in verification["formats"].items()}
        # A SavedModel's bytes differ from one writing to the next, so its content is named by what made it.
        identity = json.dumps({"inputs": self.inputs, "formats": sorted(formats), "kubegraft": __version__})
        return Outcome(
            digest=hashlib.sha256(identity.encode()).hexdigest(),
            metrics={
                **{f"{name}_max_difference": difference for name, difference in formats.items()},
                "num_verification_images": float(verification["num_images"]),
            },
            provenance={
                **{f"{name}_digest": digest for name, digest in self.inputs.items()},
                "formats": ",".join(sorted(formats)),
                "tolerance": self.config.tolerance,
                "kubegraft": __version__,
                "tensorflow": verification["tensorflow"],
            },
        )


def _require_same_model(evaluation: StageResult, model_digest: str) -> None:
    evaluated = evaluation.provenance.get("model_digest")
    if evaluation.stage != "evaluate" or evaluated != model_digest:
        raise ExportError(
            "`evaluation` must be the evaluation of this very model. Received: a result of "
            f"{evaluation.stage!r} about model {evaluated!r}, for model {model_digest!r}. "
            "Evaluate this model first."
        )
