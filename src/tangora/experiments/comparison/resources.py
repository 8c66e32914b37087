"""What a comparison may use."""

from dataclasses import dataclass

from tangora._checks import check_number, check_whole

_MOST = 1e6
"""Hours or gigabytes: more is meant for no limit."""


@dataclass(frozen=True)
class Resources:
    """What a comparison may use; no part of what it is.

    Attributes:
        jobs: Runs side by side.
        hours: No run begins that is not expected to end within so many; ``None`` for no limit.
        gigabytes: What each run may allocate, on a CPU under Linux; ``None`` for no limit.
        retry: Whether runs that failed or ran out of memory are made again.
    """

    jobs: int = 1
    hours: float | None = None
    gigabytes: float | None = None
    retry: bool = False

    def __post_init__(self) -> None:
        check_whole("jobs", self.jobs, low=1)
        if self.hours is not None:
            check_number("hours", self.hours, low=0, high=_MOST)
        if self.gigabytes is not None:
            check_number("gigabytes", self.gigabytes, low=0, open_low=True, high=_MOST)
