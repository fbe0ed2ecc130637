"""What a page must be to everyone, as a browser measures it."""

from typing import Any

_SEEN = """
const seen = (e) => e.checkVisibility() && e.getClientRects().length > 0;
const all = (selector) => [...document.querySelectorAll(selector)].filter(seen);
const name = (e) => e.id || e.className || e.tagName.toLowerCase() + " " + e.textContent.trim().slice(0, 30);
"""  # noqa: E501
_CONTROLS = """
const target = (e) => (e.type === "checkbox" && e.closest("label")) || e;
return all("button, input, textarea, select, summary, nav a, a.data").flatMap((e) => {
  const { width, height } = target(e).getBoundingClientRect();
  return Math.min(width, height) < 43.9 ? [`${name(e)}: ${width} x ${height}`] : [];
});
"""
_CUT = """
return all("body *").flatMap((e) => {
  const style = getComputedStyle(e), { right } = e.getBoundingClientRect();
  const scrolls = e.closest(".wide, .main-svg, svg") || ["auto", "scroll"].includes(style.overflowX);
  const cut = e.scrollWidth > e.clientWidth + 1 && style.overflowX === "hidden" && e.clientWidth;
  return !scrolls && (cut || right > innerWidth + 1) ? [name(e)] : [];
});
"""  # noqa: E501
# Contrast as WCAG 2.1 defines it, of each text against what is painted behind it.
_FAINT = """
const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = (colour) => {
  context.clearRect(0, 0, 1, 1);
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
};
const over = ([r, g, b, a], under) => [r, g, b].map((v, i) => a * v + (1 - a) * under[i]);
const light = (rgb) => {
  const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (e) => {
  const under = e.parentElement ? behind(e.parentElement) : rgba("Canvas").slice(0, 3);
  return over(rgba(getComputedStyle(e).backgroundColor), under);
};
const opacity = (e) => (e ? Number(getComputedStyle(e).opacity) * opacity(e.parentElement) : 1);
const ratio = (e, colour) => {
  const under = behind(e), [r, g, b, a] = rgba(colour);
  const [low, high] = [light(under), light(over([r, g, b, a * opacity(e)], under))].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
const texts = all("body *").filter((e) =>
  !e.closest("svg, script, style") && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
const faint = texts.flatMap((e) => {
  const found = ratio(e, getComputedStyle(e).color);
  return found < 4.5 ? [`${name(e)}: ${found.toFixed(2)}`] : [];
});
for (const e of all("textarea, input[placeholder]")) {
  const found = ratio(e, getComputedStyle(e, "::placeholder").color);
  if (found < 4.5) faint.push(`placeholder of ${name(e)}: ${found.toFixed(2)}`);
}
for (const e of all("textarea, input:not([type=checkbox], [type=range])")) {
  const edge = ratio(e.parentElement, getComputedStyle(e).borderTopColor);
  if (edge < 3) faint.push(`edge of ${name(e)}: ${edge.toFixed(2)}`);
}
return faint;
"""  # noqa: E501


def _found(view: Any, script: str) -> list[str]:
    return view.evaluate(f"() => {{ {_SEEN} {script} }}")


def small_controls(view: Any) -> list[str]:
    """Those that a finger misses: less than 44 px wide or high (WCAG 2.1, 2.5.5)."""
    return _found(view, _CONTROLS)


def cut_texts(view: Any) -> list[str]:
    """What is wider than its box that hides the rest, or than the screen."""
    return _found(view, _CUT)


def faint(view: Any) -> list[str]:
    """Texts of less than 4.5 times the contrast, and edges of fields of less than 3 (WCAG AA)."""
    return _found(view, _FAINT)


def tab_order(view: Any, start: str, steps: int) -> list[str]:
    """What the Tab key goes to from an element, each with an outline that is seen."""
    view.focus(start)
    order = []
    for _ in range(steps):
        view.keyboard.press("Tab")
        focused, outline, width = view.evaluate(
            """() => {
                const e = document.activeElement, style = getComputedStyle(e);
                return [e.id || e.tagName.toLowerCase(), style.outlineStyle, style.outlineWidth];
            }"""
        )
        assert outline != "none", focused
        assert float(width.removesuffix("px")) >= 1, focused
        order.append(focused)
    return order
