"""A maker of optimizers by name: the table of methods can be read without torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Later:
    """Calls what a name such as ``package.module:function`` stands for, imported at the first call."""

    name: str

    @property
    def maker(self) -> Callable[..., Any]:
        """The class or function itself."""
        return resolve_name(self.name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call it."""
        return self.maker(*arguments, **options)
