"""How Sphinx builds these pages: `make docs`."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))


import reference  # it lies in docs/_ext

project = "hwdbm"
author = "The hwdbm authors"
copyright = author
release = version = installed_version("hwdbm")

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "py:obj"  # in docstrings, `Stage2` is a link

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc's parameter lines say the type, with the shape and the unit
autosummary_generate = True
autosummary_imported_members = True
autosummary_ignore_module_all = False  # what a module's __all__ has, be it from another, and nothing else

autosummary_context = {"offered": reference.offered()}

numpydoc_show_class_members = False  # automodule documents them, once
# What ruff can't see: parameters that don't exist or are out of order, sections that are unknown or
# out of order.
numpydoc_validation_checks = {"GL06", "GL07", "PR02", "PR03", "PR10", "YD01"}
# Hypothesis makes composite strategies, and the machine's TestCase, without a source that could be checked.
numpydoc_validation_exclude = {r"\.testing\.(slots|stage2s)$", r"\.TestCase"}

# pytest runs the docstrings' examples, in their modules; here only those of the pages run.
doctest_test_doctest_blocks = ""
doctest_global_setup = """
import platform
from pathlib import Path

import hwdbm

kvm = platform.machine() == "x86_64" and Path("/dev/kvm").exists()
"""

html_theme = "pydata_sphinx_theme"
html_title = f"hwdbm {release}"
html_show_sourcelink = False
html_static_path = ["_static", "schemas"]
html_css_files = ["hwdbm.css"]
html_theme_options = {
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "navigation_with_keys": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "start": [], "tutorial": []}


html_context = {"default_mode": "auto"}
html_favicon = "_static/icon.svg"


def sweep(app, _):
    """Remove the pages of an earlier build whose source is gone."""
    made = {*app.env.found_docs, "genindex", "py-modindex", "search"}
    for page in Path(app.outdir).rglob("*.html"):
        if "_static" not in page.parts and str(page.relative_to(app.outdir).with_suffix("")) not in made:
            page.unlink()


def elsewhere(app, env, node, contnode):
    """Find a name by its short way, as in `hwdbm.Stage2`, or by the way of the module that defines it."""
    target = str(node.get("reftarget", ""))
    if node.get("refdomain") != "py" or not target:
        return None
    domain = env.get_domain("py")
    for tail in (target.rpartition(".")[2], ".".join(target.split(".")[-2:])):
        found = {name for name, each in domain.objects.items() if name.endswith(f".{tail}") and not each.aliased}
        if len(found) == 1:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found.pop(), node, contnode)
    return None


def setup(app):
    """Have the pages that are made from the program written before the sources are read; and draw."""
    import pictures
    from docutils import nodes
    from docutils.parsers.rst import Directive

    class Picture(Directive):
        required_arguments, has_content = 1, False

        def run(self):
            svg = pictures.DRAWN[self.arguments[0]]()
            return [nodes.raw("", f'<figure class="picture">{svg}</figure>', format="html")]

    app.add_directive("picture", Picture)
    app.connect("config-inited", reference.write)
    app.connect("config-inited", reference.forget)
    app.connect("build-finished", sweep)
    app.connect("missing-reference", elsewhere)
