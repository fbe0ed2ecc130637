"""The same work in this process, or in processes of Ray's (an extra: pip install 'fallow[ray]')."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from fallow.common.errors import UsageError

Result = TypeVar("Result")
RETRIES = 3  # of a part whose worker died


def results(
    function: Callable[..., Result], parts: Sequence[tuple[Any, ...]], workers: int
) -> Iterator[tuple[int, Result]]:
    """function(*part) of every part, with its number, as they finish.

    With one worker in turn and in this process; otherwise as tasks of Ray, of the cluster that
    RAY_ADDRESS names or of one that is started here. A part whose worker dies is done again.

    Raises:
        UsageError: no worker.
        ModuleNotFoundError: Ray is not installed.
    """
    if workers < 1:
        raise UsageError(f"--workers {workers} is too few; give at least 1")
    if workers == 1:
        yield from ((i, function(*part)) for i, part in enumerate(parts))
        return
    import ray

    if not ray.is_initialized():
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    task = ray.remote(max_retries=RETRIES, num_cpus=1)(function)
    numbers = {task.remote(*part): i for i, part in enumerate(parts)}
    waiting = list(numbers)
    while waiting:
        finished, waiting = ray.wait(waiting)
        yield numbers[finished[0]], ray.get(finished[0])
