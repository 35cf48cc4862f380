"""What all commands have in common."""

from __future__ import annotations

import click

from sd_erase.terminal import one_line


class Failure(click.ClickException):
    """One sentence on stderr, exit code 2."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(one_line(message))


class Once(click.Command):
    """A command that refuses a setting that is given twice, under one name or under two: which one counts would be a guess."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(list(args))
        for parameter in given:
            alike = [other for other in given if other.name == parameter.name]
            if len(alike) > 1 and isinstance(parameter, click.Option) and not parameter.multiple and not parameter.is_bool_flag:
                names = list(dict.fromkeys(other.opts[0] for other in alike))
                several = f"{' and '.join(names)} decide the same and are given together: pass one of them."
                raise click.UsageError(several if names[1:] else f"{names[0]} is given {len(alike)} times: pass it once.", ctx)
        return super().parse_args(ctx, args)
