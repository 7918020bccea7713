"""Print the image's software bill of materials: CycloneDX 1.6 JSON of the Python packages of this interpreter.

Run by the environment's own interpreter while the image is built; needs the standard library only. Reads no
clock and draws no random number, so that equal images have equal bills.
"""

import importlib.metadata
import json
import re
import sys
from typing import Any


def main() -> int:
    """Print the document; return the exit code."""
    json.dump(document(), sys.stdout, indent=1, sort_keys=True)
    print()
    return 0


def document() -> dict[str, Any]:
    """Return the bill of what is installed; kubegraft itself is its subject."""
    components = {entry["bom-ref"]: entry for entry in map(component, importlib.metadata.distributions())}
    subject = next((entry for entry in components.values() if entry["name"] == "kubegraft"), None)
    others = [entry for _, entry in sorted(components.items()) if entry is not subject]
    metadata = {"component": {**subject, "type": "application"}} if subject else {}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": metadata,
        "components": others,
    }


def component(distribution: importlib.metadata.Distribution) -> dict[str, Any]:
    """Return the entry of one package."""
    name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
    purl = f"pkg:pypi/{name}@{distribution.version}"
    entry: dict[str, Any] = {
        "type": "library",
        "name": name,
        "version": distribution.version,
        "purl": purl,
        "bom-ref": purl,
    }
    if said := licence(distribution):
        entry["licenses"] = [said]
    return entry


def licence(distribution: importlib.metadata.Distribution) -> dict[str, Any] | None:
    """Return what the package says of its licence: an SPDX expression if it has one, or else its own words."""
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return {"expression": expression}
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier") or []
        if line.startswith("License ::")
    ]
    words = (metadata.get("License") or "").strip()
    name = words if words and len(words.splitlines()) == 1 else ", ".join(classifiers)
    return {"license": {"name": name}} if name else None


if __name__ == "__main__":
    raise SystemExit(main())
