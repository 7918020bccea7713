"""Manifests as YAML that a person reads: in the order they were made in, text with lines as text with lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kubegraft import __version__
from kubegraft.rendering.pods import Manifest


def to_documents(manifests: Sequence[Manifest]) -> str:
    """Return the manifests as one YAML text."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Dumper without anchors, which `kubectl` reads and people don't."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def shown(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, shown)
    body = yaml.dump_all(manifests, Dumper=Dumper, sort_keys=False, width=110, allow_unicode=True)
    return f"# Written by kubegraft {__version__}: kubectl apply -f FILE\n{body}"
