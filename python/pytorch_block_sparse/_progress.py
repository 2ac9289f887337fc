"""A progress bar over what takes long on large models, if tqdm is installed. Else nothing."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    """`items`, with a bar once they have taken longer than two seconds."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    bar: Iterable[Item] = tqdm(items, desc=what, unit="layer", delay=2, leave=False)
    return bar
