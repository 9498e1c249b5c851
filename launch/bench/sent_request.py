"""What came of one request of a load."""

import math
from dataclasses import dataclass


@dataclass
class Sent:
    """A request, times in seconds since it was due.

    Attributes:
        due: when it was, in seconds since the load began.
        first, last: when its first and last token came; tokens: how many; status: HTTP's, or 0 for no answer.
    """

    first: float = math.nan
    last: float = math.nan
    tokens: int = 0
    status: int = 0
    error: str = ""
    due: float = 0.0

    @property
    def good(self) -> bool:
        return self.status == 200 and self.tokens > 0 and not self.error

    @property
    def each(self) -> float:
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else math.nan
