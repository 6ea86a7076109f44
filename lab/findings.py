# SPDX-License-Identifier: Apache-2.0
"""What a trial of something large has found, line by line."""

from rich.markup import escape
from rich.table import Table


class Findings:
    """What was found, and whether all of it is right."""

    def __init__(self) -> None:
        self.table = Table(box=None, padding=(0, 2), show_header=False)
        self.right = True

    def note(self, what: str, found: object, right: bool = True) -> None:
        """Add a line."""
        self.table.add_row(escape(what), escape(str(found)), "" if right else "[red]wrong[/red]")
        self.right = self.right and right


def seconds(value: float) -> str:
    """A time, for people."""
    return f"{value:.1f} s"
