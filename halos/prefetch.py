"""Items of an iterable, computed one ahead in a background thread."""

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def ahead(items: Iterable[T], device: torch.device) -> Generator[T]:
    """Yield the items. While one is used, the next one is computed in a thread. Close the iterator to end the thread.

    device: where the items are moved to; a thread has a current GPU of its own
    """
    iterator, end = iter(items), object()

    def start() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=start) as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item  # type: ignore[misc]
