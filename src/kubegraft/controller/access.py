"""How this process reaches the API server: the pod's service account, or the current context of a kubeconfig."""

from __future__ import annotations

import base64
import os
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kubegraft.errors import EnvironmentFault

_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """An API server, and who calls it.

    Attributes:
        server: URL without a path.
        authority: PEM text of the certificate authority; "" for the system's.
        token: Bearer token; "" for none.
        token_path: File with the token, read anew for each call since the kubelet renews it; "" for none.
        certificate: PEM text of a client certificate; "" for none.
        key: PEM text of its key.
        namespace: Namespace of the pod or of the context.
    """

    server: str
    authority: str = ""
    token: str = ""
    token_path: str = ""
    certificate: str = ""
    key: str = ""
    namespace: str = "default"

    def bearer(self) -> str:
        """Return the token as it is now; "" for none."""
        return Path(self.token_path).read_text(encoding="utf-8").strip() if self.token_path else self.token

    def tls(self) -> ssl.SSLContext | bool:
        """Return the context for connections; True, which means the default, for plain HTTP."""
        if not self.server.startswith("https:"):
            return True
        context = ssl.create_default_context(cadata=self.authority or None)
        if self.certificate:
            with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:  # OpenSSL takes files only
                file.write(f"{self.certificate}\n{self.key}\n")
                file.flush()
                context.load_cert_chain(file.name)
        return context


def find_access() -> Access:
    """Return the access of the pod that this runs in, else that of the current kubeconfig.

    Raises:
        EnvironmentFault: If there is neither, or the kubeconfig wants a program to log in.
    """
    if host := os.environ.get("KUBERNETES_SERVICE_HOST"):
        port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        return Access(
            server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
            authority=(_ACCOUNT / "ca.crt").read_text(encoding="ascii"),
            token_path=str(_ACCOUNT / "token"),
            namespace=(_ACCOUNT / "namespace").read_text(encoding="ascii").strip(),
        )
    path = Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config").expanduser()
    if not path.is_file():
        raise EnvironmentFault(
            f"`KUBECONFIG` must name a kubeconfig outside of a cluster. Received: {str(path)!r}, which is no file. "
            "In a pod, leave its service account's token mounted."
        )
    import yaml

    return from_kubeconfig(yaml.safe_load(path.read_text(encoding="utf-8")))


def from_kubeconfig(config: Mapping[str, Any]) -> Access:
    """Return the access of a kubeconfig's current context.

    Args:
        config: The file's content.

    Raises:
        EnvironmentFault: If it does not say how to log in by a certificate or a token.
    """
    context = _named(config, "contexts", config.get("current-context"))["context"]
    cluster = _named(config, "clusters", context["cluster"])["cluster"]
    user = _named(config, "users", context["user"])["user"]
    token, token_path = user.get("token", ""), user.get("tokenFile", "")
    certificate = _pem(user, "client-certificate")
    if not (token or token_path or certificate):
        raise EnvironmentFault(
            "The kubeconfig's user must have a token or a client certificate. Received: "
            f"{', '.join(sorted(user)) or 'nothing'}. Login programs are not run; make a service account's kubeconfig."
        )
    return Access(
        server=cluster["server"].rstrip("/"),
        authority=_pem(cluster, "certificate-authority"),
        token=token,
        token_path=token_path,
        certificate=certificate,
        key=_pem(user, "client-key"),
        namespace=context.get("namespace") or "default",
    )


def _named(config: Mapping[str, Any], section: str, name: Any) -> Mapping[str, Any]:
    for entry in config.get(section) or ():
        if entry.get("name") == name:
            found: Mapping[str, Any] = entry
            return found
    raise EnvironmentFault(
        f"The kubeconfig's `{section}` must have the entry that its current context names. Received: {name!r}. "
        "`kubectl config use-context NAME` sets it."
    )


def _pem(entry: Mapping[str, Any], name: str) -> str:
    if data := entry.get(f"{name}-data"):
        return base64.b64decode(data).decode("ascii")
    return Path(entry[name]).read_text(encoding="ascii") if entry.get(name) else ""
