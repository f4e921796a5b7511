"""How many iterations were left out because their numbers were not finite."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NonfiniteCount:
    """Iterations whose loss or gradient norm was not finite; they changed nothing."""

    total: int = 0
    """Since the run began; a resume goes on counting."""
    in_a_row: int = 0
    """The last ones without a good iteration between."""

    def after(self, *, is_finite: bool) -> "NonfiniteCount":
        """Return the count after one more iteration."""
        if is_finite:
            return NonfiniteCount(total=self.total)
        return NonfiniteCount(total=self.total + 1, in_a_row=self.in_a_row + 1)
