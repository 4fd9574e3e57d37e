"""One bar for a part of the demonstration, on standard error."""

from tqdm.auto import tqdm


class Progress:
    """A bar over units of work that says what is being done.

    Args:
        name: of the part.
        total: units of work.
    """

    def __init__(self, name: str, total: int) -> None:
        self._name = name
        self._bar = tqdm(total=total, bar_format="{desc:<52}{percentage:3.0f}% |{bar:24}| {elapsed}", mininterval=0.2)

    def say(self, what: str) -> None:
        """What comes next."""
        self._bar.set_description_str(f"{self._name}: {what}")

    def advance(self, units: int = 1) -> None:
        """So much is done."""
        self._bar.update(units)

    def close(self) -> None:
        """All is done."""
        self.say("done")
        self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()
