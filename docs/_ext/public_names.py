"""Let annotations and docstrings, which name private modules, lead to the public names."""

from __future__ import annotations

from typing import Any, Final

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

__all__ = ["setup"]

#: Where a class of a private module may be documented: the first that has it.
ROOMS: Final = (
    *("criupy.rpc", "criupy.errors", "criupy.lazy_pages", "criupy.page_server", "criupy.runc"),
    *("criupy.images", "criupy"),
    *("criupy.rpc._options", "criupy.testing", "criupy.testing.rpc_peer_linux"),
)


def public_names(name: str) -> list[str]:
    """Return under which names a class may be documented, those beside where it is first."""
    module, _, last = name.rpartition(".")
    package = ".".join(part for part in module.split(".") if not part.startswith("_"))
    return [f"{room}.{last}" for room in dict.fromkeys((package, *ROOMS))]


def find_reference(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Look for what was not found where it is."""
    if node.get("refdomain") != "py":
        return None
    domain = env.domains.python_domain
    for name in public_names(node["reftarget"]):
        if name in domain.objects:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)
    return None


def setup(app: Sphinx) -> dict[str, Any]:
    """Listen for what was not found."""
    app.connect("missing-reference", find_reference)
    return {"parallel_read_safe": True}
