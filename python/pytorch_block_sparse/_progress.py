"""A progress bar over what takes long on large models, if tqdm is installed. Else nothing."""

from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str) -> Iterable[Item]:
    """`items`, with a bar once they have taken longer than two seconds."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    bar: Iterable[Item] = tqdm(items, desc=what, delay=2, leave=False)
    return bar
