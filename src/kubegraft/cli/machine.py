"""`kubegraft doctor` and `kubegraft compile`."""

from __future__ import annotations

import sys
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
@click.option("--image", default="", help="Image of the tasks, with a tag that never moves.")
@click.option("--registry", default="", help="Registry of the released image, where yours has a copy.")
@DebugOption.decorate
@click.pass_context
def compile_pipeline(
    context: click.Context, output_dir: str | None, check: bool, image: str, registry: str
) -> None:
    """Write transfer_learning.yaml, which the Kubeflow Pipelines UI accepts.

    In a checkout this compiles the pipeline's source. An installed kubegraft carries the compiled file and
    copies it.
    """
    from kubegraft.local_run import find_checkout

    checkout = find_checkout()
    if checkout is None:
        context.exit(_packaged(output_dir, check=check, image=image, registry=registry))
    sys.path.insert(0, str(checkout))
    from pipelines.compile import main

    arguments = ["--check"] if check else []
    given = {"--output-dir": output_dir, "--image": image, "--registry": registry}
    context.exit(main([*arguments, *(word for pair in given.items() if pair[1] for word in pair)]))


def _packaged(output_dir: str | None, *, check: bool, image: str, registry: str) -> int:
    from kubegraft.kfp_client.package import load_package
    from kubegraft.local_run import packaged_pipeline

    text = load_package().with_image(image=image, registry=registry).text
    target = Path(output_dir or ".") / packaged_pipeline().name
    if check:
        same = target.exists() and target.read_text(encoding="utf-8") == text
        click.echo(f"{target} {'is' if same else 'is not'} what this kubegraft carries")
        return 0 if same else 1
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    click.echo(target)
    return 0
