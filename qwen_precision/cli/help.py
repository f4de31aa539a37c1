"""Help of a command: its options under the headings they have, each name whole; and where to look when one is wrong."""

from typing import Any

from typer.core import TyperCommand


class Grouped(TyperCommand):
    """A command whose help lists options by ``rich_help_panel``; what has none comes first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; an option without its value is told as any other mistake is, with the command's own help.

        Args:
            ctx: of click, which leaves it out of that error.
            args: words behind the command.
        """
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write all parameters into the help.

        Args:
            ctx: of click.
            formatter: of click; it breaks a line where a name is too long for its column.
        """
        groups: dict[str, list[tuple[str, str]]] = {}
        for each in self.get_params(ctx):
            row = each.get_help_record(ctx)
            if row is not None:
                kind = "Arguments" if each.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(each, "rich_help_panel", None) or kind, []).append(row)
        for title, rows in groups.items():
            with formatter.section(title):
                formatter.write_dl(rows)
