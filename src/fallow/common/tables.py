"""Results as people look at them: one line, a data frame, and in notebooks a table."""

import html
from collections.abc import Mapping
from typing import Any

from fallow.common.errors import FallowError

Figures = Mapping[str, Any]


class Table(list[dict[str, Any]]):
    """Rows, a dictionary each: a list, of which notebooks show a table."""

    def to_frame(self) -> Any:
        """A pandas DataFrame with a line per row, what is nested under names with dots.

        Raises:
            FallowError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise FallowError("to_frame needs pandas: pip install pandas") from error
        return pandas.DataFrame([flat(row) for row in self])

    def __repr__(self) -> str:
        rows = "1 row" if len(self) == 1 else f"{len(self)} rows"
        return f"<Table of {rows}: {', '.join(self._columns())}>"

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self for name in flat(row)))

    def _repr_html_(self) -> str:
        columns = self._columns()
        rows = [columns, *([shown(flat(row).get(name)) for name in columns] for row in self)]
        cells = (
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for row, tag in zip(rows, ["th", *["td"] * len(self)], strict=True)
        )
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


class Result:
    """A result of one run: in a data frame one row, so that several can be put together."""

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_table(self) -> Table:
        """One row of all figures but lists, which have a line per layer or token."""
        figures = flat(self.to_json()).items()
        return Table([{name: value for name, value in figures if not isinstance(value, list)}])

    def to_frame(self) -> Any:
        """`to_table` as a pandas DataFrame. Raises FallowError if pandas is not installed."""
        return self.to_table().to_frame()

    def _repr_html_(self) -> str:
        """Names and figures, one below the other."""
        (row,) = self.to_table()
        return Table({"": name, "figure": value} for name, value in row.items())._repr_html_()


def flat(row: Figures, prefix: str = "") -> dict[str, Any]:
    """The same with dictionaries in it as entries of their own, "kl_to_dense.mean" say."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        nested = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def shown(value: Any) -> str:
    """A cell for readers: four digits of a number, nothing of None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plus_minus(value: float, error: float | None, digits: int = 2, sign: str = "") -> str:
    """A figure with its standard error, if it has one."""
    found = f"{value:{sign}.{digits}f}"
    return found if error is None else f"{found} ± {error:.{digits}f}"
