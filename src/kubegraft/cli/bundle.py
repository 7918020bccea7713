"""`kubegraft bundle`: what a site without internet needs, in one directory."""

from __future__ import annotations

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import SectionedCommand, input_argument, json_option
from kubegraft.cli.output import print_facts, print_json, stdout_to_stderr

_directory = input_argument("directory", "The bundle.", metavar="DIR")
_container_tool = click.option(
    "--container-tool",
    default="",
    metavar="PROGRAM",
    help="docker, podman or nerdctl; without it the first that is installed.",
)


class _OrderedGroup(click.Group):
    """Group whose subcommands stand in the order of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group("bundle", cls=_OrderedGroup)
@DebugOption.decorate
def bundle() -> None:
    """Carry everything to a site without internet.

    `create` writes Python packages, images, weights, pipelines and manifests into one directory; copy it there as you
    like; `load` verifies it and puts images and weights where the site wants them.
    """


@bundle.command("create", cls=SectionedCommand)
@input_argument("directory", "Directory to make, or to complete.", metavar="DIR")
@click.option(
    "--backbone",
    "backbones",
    multiple=True,
    metavar="NAME",
    help="Backbone whose ImageNet weights go with it; repeatable. EfficientNet-Lite0's always do.",
)
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="NAME:TAG",
    help="Image; repeatable. Without it the pipeline's and TensorFlow Serving's.",
)
@click.option(
    "--target", type=click.Choice(("cpu", "gpu")), default="cpu", help="Packages and image.  [default: cpu]"
)
@click.option(
    "--python",
    default="3.13",
    metavar="VERSION",
    help="Python on the other side: 3.11, 3.12 or 3.13.  [default: 3.13, the images']",
)
@click.option("--no-images", is_flag=True, help="Leave images out.")
@click.option("--no-wheels", is_flag=True, help="Leave Python packages out.")
@_container_tool
@json_option
@DebugOption.decorate
def create(
    directory: str,
    backbones: tuple[str, ...],
    images: tuple[str, ...],
    target: str,
    python: str,
    no_images: bool,
    no_wheels: bool,
    container_tool: str,
    as_json: bool,
) -> None:
    """Write everything that such a site needs into DIR.

    Packages are those of the images, by version and hash; images are pulled where they are not on this machine. The
    same call again fetches what is missing, and another one makes DIR be as it says.
    """
    import dataclasses

    from kubegraft.bundling.create import BundleRequest, create_bundle

    request = BundleRequest(
        backbones=backbones,
        images=images,
        target=target,
        python=python,
        with_images=not no_images,
        with_wheels=not no_wheels,
        container_tool=container_tool,
    )
    with stdout_to_stderr():
        made = create_bundle(directory, request)
    if as_json:
        print_json({"directory": directory, **dataclasses.asdict(made)})
        return
    num_bytes = sum(file.size for file in made.files)
    weights = [*made.packaged_backbones, *dict.fromkeys(each.backbone for each in made.weights)]
    print_facts(
        [
            ("directory", directory),
            ("files", f"{len(made.files)}, {num_bytes / 1e6:.0f} MB"),
            ("wheels", f"{len(made.of_kind('wheel'))}{f', Python {made.python}' if made.python else ''}"),
            ("images", ", ".join(image.name for image in made.images) or "none"),
            ("weights", ", ".join(weights) or "none but efficientnet_lite0's, a package"),
            ("next", f"copy it, then see {directory}/README.txt"),
        ]
    )


@bundle.command("verify", cls=SectionedCommand)
@_directory
@json_option
@DebugOption.decorate
def verify(directory: str, as_json: bool) -> None:
    """Compare every file of a bundle with its size and SHA-256.

    Ends with exit code 8 if one is missing or another one, and names all such.
    """
    from kubegraft.bundling.index import verify_bundle

    with stdout_to_stderr():
        found = verify_bundle(directory)
    num_bytes = sum(file.size for file in found.files)
    if as_json:
        print_json(
            {
                "directory": directory,
                "kubegraft": found.kubegraft,
                "num_files": len(found.files),
                "num_bytes": num_bytes,
            }
        )
    else:
        click.echo(
            f"{directory}: all {len(found.files)} files, {num_bytes / 1e6:.0f} MB, are as they were written"
        )


@bundle.command("load", cls=SectionedCommand)
@_directory
@click.option(
    "--registry",
    default="",
    metavar="HOST/PATH",
    help="Registry to push the images to; without it they stay with the container tool.",
)
@click.option(
    "--kind", default="", metavar="CLUSTER", help="Put the images on a kind cluster's nodes instead."
)
@click.option(
    "--weights-to",
    default="",
    metavar="DIR|URI",
    help="Directory, or gs:// or s3:// folder, for the weights; without it they stay in the bundle.",
)
@click.option("--dry-run", is_flag=True, help="Verify, and say what would be done.")
@_container_tool
@json_option
@DebugOption.decorate
def load(
    directory: str,
    registry: str,
    kind: str,
    weights_to: str,
    dry_run: bool,
    container_tool: str,
    as_json: bool,
) -> None:
    """Verify a bundle, then load its images and weights.

    Nothing is loaded from a bundle of which a file is missing or damaged. A tag that the registry has is left as it
    is. Prints the commands to go on with.
    """
    from kubegraft.bundling.load import Destination, load_bundle

    destination = Destination(
        registry=registry, kind_cluster=kind, weights_uri=weights_to, container_tool=container_tool
    )
    with stdout_to_stderr():
        outcome = load_bundle(directory, destination, dry_run=dry_run)
    if as_json:
        print_json(outcome)
        return
    would = "would be " if dry_run else ""
    rows = [("verified", f"{outcome['num_files']} files of kubegraft {outcome['kubegraft']}")]
    rows += [("image", f"{name}  {would}loaded as {there}") for name, there in outcome["images"].items()]
    if outcome["weights"]:
        rows.append(("weights", f"{would}copied to {outcome['weights']}"))
    print_facts([*rows, *(("next", command) for command in outcome["next"])])
