"""`kubegraft doctor` and `kubegraft compile`."""

from __future__ import annotations

from pathlib import Path

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import SectionedCommand, json_option
from kubegraft.cli.output import print_json, stdout_to_stderr
from kubegraft.errors import EnvironmentFault


@click.command("doctor", cls=SectionedCommand)
@json_option
@DebugOption.decorate
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Say what this machine has and lacks for kubegraft, and what to do about it.

    Ends with exit code 9 if something is missing that every run needs.
    """
    import dataclasses

    from kubegraft.doctor import examine

    with stdout_to_stderr():
        checks = examine()
    able = all(check.status != "fail" for check in checks)
    if as_json:
        print_json({"ok": able, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            click.echo(f"{check.status:4}  {check.name.ljust(width)}  {check.found}")
            if check.advice:
                click.echo(f"{'':{width + 8}}-> {check.advice}")
    context.exit(0 if able else EnvironmentFault.exit_code)


@click.command("compile", cls=SectionedCommand)
@click.option(
    "--output-dir",
    "-o",
    metavar="DIR",
    help="Where to write it; in a checkout pipelines/compiled by default.",
)
@click.option("--check", is_flag=True, help="Compare with what is there instead; exit 1 if it differs.")
@click.option(
    "--profile",
    type=click.Choice(("cpu", "gpu")),
    help="Only this variant; gpu trains in the image for GPUs and asks for one.  [default: both]",
)
@click.option("--image", default="", help="Image of the tasks, with a tag that never moves.")
@click.option("--gpu-image", default="", help="Image of the training tasks in the GPU variant.")
@click.option("--registry", default="", help="Registry of the released images, where yours has a copy.")
@click.option(
    "--work-claim",
    default="",
    metavar="NAME",
    help="Volume claim, for retries that continue from a checkpoint.",
)
@click.option(
    "--secret",
    default="",
    metavar="NAME",
    help="Secret whose keys are the tasks' credentials for buckets.",
)
@click.option(
    "--node-selector",
    multiple=True,
    metavar="LABEL=VALUE",
    help="Label of the training tasks' nodes; repeatable.",
)
@DebugOption.decorate
@click.pass_context
def compile_pipeline(
    context: click.Context,
    /,
    output_dir: str | None,
    check: bool,
    profile: str | None,
    node_selector: tuple[str, ...],
    **names: str,
) -> None:
    """Write transfer_learning.yaml and transfer_learning_gpu.yaml, which the Kubeflow Pipelines UI accepts.

    In a checkout this compiles the pipeline's source. An installed kubegraft carries the compiled files and
    copies them. With an --image of a name of your own, only the first, unless --gpu-image names the other.
    """
    from kubegraft.local_run import find_checkout, import_from_checkout

    checkout = find_checkout()
    if checkout is None:
        profiles = [profile] if profile else _profiles(names["image"], names["gpu_image"])
        same = [_packaged(output_dir, name, node_selector, check=check, **names) for name in profiles]
        context.exit(0 if all(same) else 1)
    main = import_from_checkout(checkout, "pipelines.compile").main
    arguments = ["--check"] if check else []
    given = {"output_dir": output_dir, "profile": profile, **names}
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in given.items() if value]
    pairs += [("--node-selector", label) for label in node_selector]
    context.exit(main([*arguments, *(word for pair in pairs for word in pair)]))


def _profiles(image: str, gpu_image: str) -> list[str]:
    from kubegraft.kfp_client.package import load_package

    told = not image or gpu_image or load_package("gpu").image_beside(image)
    return ["cpu", "gpu"] if told else ["cpu"]


def _packaged(
    output_dir: str | None,
    profile: str,
    node_selector: tuple[str, ...],
    *,
    check: bool,
    image: str,
    gpu_image: str,
    registry: str,
    work_claim: str,
    secret: str,
) -> bool:
    """Write or compare one file that the installation carries; return whether it is as it should be."""
    from kubegraft.kfp_client.package import load_package
    from kubegraft.kfp_client.placement import parse_selector
    from kubegraft.local_run import packaged_pipeline

    package = load_package(profile)
    package = package.with_image(
        image=image, registry=registry, gpu_image=gpu_image if profile == "gpu" else ""
    )
    package = package.with_node_selector(dict(map(parse_selector, node_selector)))
    text = package.with_work_claim(work_claim).with_secret(secret).text
    target = Path(output_dir or ".") / packaged_pipeline(profile).name
    if check:
        same = target.exists() and target.read_text(encoding="utf-8") == text
        click.echo(f"{target} {'is' if same else 'is not'} what this kubegraft carries")
        return same
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    click.echo(target)
    return True
