"use strict";
// Draws each figure when it comes near the screen, in the page's colours; menus, tokens, downloads.
(() => {
  const touch = matchMedia("(pointer: coarse)").matches;
  // No toolbar: one drags to look closer, and a double click shows all again.
  const config = { responsive: true, displayModeBar: false };
  const drawn = new Set();

  const content = (figure) =>
    (figure.content ??= JSON.parse(figure.querySelector("script").textContent));

  const axis = (own) => ({
    gridcolor: "rgba(128,128,128,.25)",
    zerolinecolor: "rgba(128,128,128,.4)",
    automargin: true,
    fixedrange: touch, // a finger scrolls the page
    ...own,
  });

  const layout = (own) => ({
    ...own,
    font: { color: getComputedStyle(document.body).color, size: 12 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    dragmode: touch ? false : "zoom",
    xaxis: axis(own.xaxis),
    yaxis: axis(own.yaxis),
  });

  function draw(figure) {
    const { variants, data } = content(figure);
    if (figure.classList.contains("tokens") && figure.token === undefined) {
      showToken(figure, data.mean.indexOf(Math.max(...data.mean)));
      return;
    }
    const name = figure.querySelector("select")?.value ?? Object.keys(variants)[0];
    const places = figure.querySelectorAll(".drawing");
    const chosen = figure.classList.contains("choosing") ? choose(figure, data[name]) : undefined;
    variants[name].forEach((plot, i) => {
      if (figure.token !== undefined) {
        plot.data[0].y = data.active[figure.token].map((ratio) => 100 * ratio);
      }
      const shown = layout(plot.layout);
      if (chosen) shown.shapes = [...(shown.shapes ?? []), mark(chosen.x)];
      Plotly.react(places[i], plot.data, shown, config);
    });
    drawn.add(figure);
  }

  const mark = (x) => ({
    type: "line", yref: "paper", x0: x, x1: x, y0: 0, y1: 1,
    line: { color: "rgba(128,128,128,.8)", width: 2 },
  });

  /** The row that the slider is at: at first the sparsest of at most +1 % PPL. */
  function choose(figure, rows) {
    const slider = figure.querySelector("input");
    slider.max = rows.length - 1;
    if (!slider.dataset.moved) {
      slider.value = Math.max(0, rows.findLastIndex((row) => row.change <= 1));
    }
    const row = rows[slider.value];
    figure.querySelector(".detail").textContent = row.text;
    slider.setAttribute("aria-valuetext", row.text);
    return row;
  }

  function showToken(figure, index) {
    const { data } = content(figure);
    const spans = figure.querySelectorAll(".text span");
    spans[figure.token]?.classList.remove("on");
    spans[index].classList.add("on");
    figure.token = index;
    figure.querySelector(".detail").textContent =
      `${JSON.stringify(data.tokens[index])}, token ${index}: ` +
      `${(100 * data.mean[index]).toFixed(1)} % of neurons active`;
    draw(figure);
  }

  function watchTokens(figure) {
    const box = figure.querySelector(".text");
    const point = (event) => {
      const index = event.target.dataset.token;
      if (index !== undefined && Number(index) !== figure.token) showToken(figure, Number(index));
    };
    box.addEventListener("pointerover", point);
    box.addEventListener("click", point);
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = (figure.token ?? -1) + step;
      if (step && next >= 0 && next < content(figure).data.tokens.length) {
        event.preventDefault();
        showToken(figure, next);
      }
    });
  }

  /** What a figure shows, as plain series. */
  function series(figure) {
    const { title, command, variants, data } = content(figure);
    const found = [];
    for (const [show, plots] of Object.entries(variants)) {
      plots.forEach((plot, panel) => {
        for (const { name, x, y, z, error_x, error_y } of plot.data) {
          found.push({ show, panel, name, x, y, z, error_x, error_y });
        }
      });
    }
    return { title, command, data, series: found };
  }

  const near = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (isIntersecting) {
          near.unobserve(target);
          draw(target);
        }
      }
    },
    { rootMargin: "400px" },
  );

  for (const figure of document.querySelectorAll(".figure")) {
    if (figure.querySelector(".drawing")) near.observe(figure);
    figure.querySelector("select")?.addEventListener("change", () => draw(figure));
    figure.querySelector(".slider input")?.addEventListener("input", (event) => {
      event.target.dataset.moved = "yes";
      draw(figure);
    });
    if (figure.classList.contains("tokens")) watchTokens(figure);
    const link = figure.querySelector("a.data");
    link.addEventListener("click", () => {
      const text = JSON.stringify(series(figure));
      link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
})();
