"use strict";
(() => {
  const root = document.documentElement;
  const charts = new Map(); // Bokeh's plot -> what this script knows of its figure
  const MOST_IN_TOOLTIP = 12;

  function remember(name, value) {
    try { localStorage.setItem(`kvgraft-${name}`, value); } catch { /* a file that may not keep anything */ }
  }
  function remembered(name) {
    try { return localStorage.getItem(`kvgraft-${name}`); } catch { return null; }
  }

  function setLanguage(language) {
    root.dataset.language = language;
    root.lang = language;
  }
  function setTheme(theme) {
    root.dataset.theme = theme;
    for (const plot of charts.keys()) paint(plot);
  }

  /** Colours of axes and labels, which Bokeh draws and no style sheet reaches. */
  function paint(plot) {
    const style = getComputedStyle(root);
    const soft = style.getPropertyValue("--soft").trim();
    const line = style.getPropertyValue("--line").trim();
    const ink = style.getPropertyValue("--ink").trim();
    for (const part of [...plot.below, ...plot.left, ...plot.center]) {
      if (part.type.endsWith("Axis")) {
        part.major_label_text_color = soft;
        part.axis_line_color = line;
        part.major_tick_line_color = line;
      } else if (part.type === "Grid") {
        part.grid_line_color = line;
      } else if (part.type === "Span") {
        part.line_color = soft;
      } else if (part.type === "ColorBar") {
        part.major_label_text_color = soft;
      }
    }
    for (const renderer of plot.renderers) {
      if (renderer.glyph.type === "Text") renderer.glyph.text_color = { value: ink };
    }
  }

  function column(source, name) {
    return source.get_column ? source.get_column(name) : source.data[name];
  }

  /** Index of the entry of `steps` (ascending) that is nearest to `step`. */
  function nearest(steps, step) {
    let low = 0;
    let high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
  }

  function written(chart, value) {
    if (!Number.isFinite(value)) return "–";
    return chart.share ? `${(100 * value).toFixed(1)} %` : String(Number(value.toPrecision(4)));
  }

  /** What every visible arm has nearest to `step`. */
  function readings(chart, step) {
    return chart.arms.map((arm) => {
      const steps = column(arm.line.data_source, "step");
      const at = nearest(steps, step);
      const value = column(arm.line.data_source, `mean ${arm.index}`)[at];
      let text = written(chart, value);
      if (arm.band && Number.isFinite(value)) {
        const [low, high] = ["low", "high"].map((end) => column(arm.band.data_source, `${end} ${arm.index}`)[at]);
        if (low !== high) text += ` (${written(chart, low)}–${written(chart, high)})`;
      }
      return { arm, step: steps[at], value, text };
    });
  }

  function read(chart, step) {
    const found = readings(chart, step);
    for (const { arm, text } of found) arm.button.querySelector(".value").textContent = text;
    const shown = found.filter(({ arm }) => arm.line.visible);
    const at = shown.length ? shown.reduce((a, b) => (Math.abs(a.step - step) <= Math.abs(b.step - step) ? a : b)).step : step;
    chart.ruler.location = at;
    chart.ruler.visible = true;
    chart.slider.value = at;
    chart.stepShown.textContent = at;
    return { at, shown };
  }

  function showTooltip(chart, event, { at, shown }) {
    const box = chart.tooltip;
    const near = [...shown]
      .sort((a, b) => Math.abs(a.value - event.y) - Math.abs(b.value - event.y))
      .slice(0, MOST_IN_TOOLTIP)
      .sort((a, b) => b.value - a.value);
    const head = document.createElement("b");
    head.append(...[...chart.stepLabel.childNodes].map((node) => node.cloneNode(true)), ` ${at}`);
    const rows = near.map(({ arm, text }) => {
      const row = document.createElement("div");
      row.append(arm.button.querySelector(".swatch").cloneNode(true));
      for (const [name, content] of [["name", arm.name], ["value", text]]) {
        const part = document.createElement("span");
        part.className = name;
        part.textContent = content;
        row.append(part);
      }
      return row;
    });
    box.replaceChildren(head, ...rows);
    box.hidden = false;
    const width = chart.plotBox.clientWidth;
    const left = event.sx > width / 2 ? event.sx - box.offsetWidth - 14 : event.sx + 14;
    box.style.left = `${Math.max(0, Math.min(left, width - box.offsetWidth))}px`;
    box.style.top = `${Math.max(0, event.sy - box.offsetHeight / 2)}px`;
  }

  function highlight(chart, chosen) {
    for (const arm of chart.arms) {
      const faded = chosen !== null && arm !== chosen;
      arm.line.glyph.line_alpha = { value: faded ? 0.2 : 1 };
      arm.line.glyph.line_width = { value: arm === chosen ? 3.5 : 2 };
      if (arm.band) arm.band.glyph.fill_alpha = faded ? 0.04 : 0.18;
    }
  }

  function toggle(chart, arm) {
    const visible = !arm.line.visible;
    arm.line.visible = visible;
    if (arm.band) arm.band.visible = visible;
    arm.button.setAttribute("aria-pressed", String(visible));
  }

  function setRange(chart, button) {
    const whole = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(whole));
    const [start, end] = chart.figure.dataset[whole ? "whole" : "settled"].split(" ").map(Number);
    chart.plot.y_range.setv({ start, end });
  }

  function wire(figure, plot) {
    const named = (name) => plot.renderers.find((renderer) => renderer.name === name);
    const chart = {
      figure,
      plot,
      share: figure.dataset.share === "true",
      slider: figure.querySelector("input"),
      stepShown: figure.querySelector(".step"),
      stepLabel: figure.querySelector(".step-label"),
      tooltip: figure.querySelector(".tooltip"),
      plotBox: figure.querySelector(".plot"),
      ruler: plot.center.find((part) => part.name === "ruler"),
    };
    chart.arms = [...figure.querySelectorAll(".arm")].map((button) => {
      const index = Number(button.dataset.index);
      const name = button.querySelector(".name").textContent;
      return { button, index, name, line: named(`line ${index}`), band: named(`band ${index}`) };
    });
    for (const arm of chart.arms) {
      arm.button.addEventListener("click", () => toggle(chart, arm));
      for (const event of ["mouseenter", "focus"]) arm.button.addEventListener(event, () => highlight(chart, arm));
      for (const event of ["mouseleave", "blur"]) arm.button.addEventListener(event, () => highlight(chart, null));
    }
    chart.slider.addEventListener("input", () => {
      chart.tooltip.hidden = true;
      const wanted = Number(chart.slider.value);
      read(chart, wanted);
      // The reading snaps to what was measured; the slider must not, or small moves would never get anywhere.
      chart.slider.value = wanted;
    });
    const range = figure.querySelector("button.range");
    if (range) range.addEventListener("click", () => setRange(chart, range));
    charts.set(plot, chart);
    read(chart, Number(chart.slider.max));
    chart.ruler.visible = false;
  }

  window.kvgraftPage = {
    hover(event) {
      const chart = charts.get(event.origin);
      if (chart) showTooltip(chart, event, read(chart, event.x));
    },
    leave(event) {
      const chart = charts.get(event.origin);
      if (chart) chart.tooltip.hidden = true;
    },
  };

  let queue = Promise.resolve();
  function draw(figure) {
    queue = queue.then(async () => {
      const item = JSON.parse(figure.querySelector("script.item").textContent);
      const views = await Bokeh.embed.embed_item(item, figure.querySelector(".drawing"));
      const plot = [...views][0].model;
      if (figure.querySelector(".arms")) wire(figure, plot); else charts.set(plot, null);
      paint(plot);
      figure.dataset.drawn = "true";
    }).catch((error) => console.error("a chart could not be drawn:", error));
  }

  function wireStrip(strip) {
    const students = [...strip.querySelectorAll(".token.student")];
    const teachers = new Map([...strip.querySelectorAll(".token.teacher")].map((token) => [token.dataset.index, token]));
    const chosen = strip.querySelector("output.chosen");
    const choose = (token) => {
      for (const old of strip.querySelectorAll(".chosen-token, .partner")) old.classList.remove("chosen-token", "partner");
      token.classList.add("chosen-token");
      const partners = token.dataset.partners.split(" ").map((index) => teachers.get(index)).filter(Boolean);
      for (const partner of partners) partner.classList.add("partner");
      chosen.textContent = `${token.textContent} ← ${partners.map((partner) => partner.textContent).join(" + ") || "∅"}`;
    };
    for (const [place, token] of students.entries()) {
      token.addEventListener("mouseenter", () => choose(token));
      token.addEventListener("focus", () => choose(token));
      token.addEventListener("click", () => token.focus());
      token.addEventListener("keydown", (event) => {
        const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        const next = move && students[place + move];
        if (!next) return;
        event.preventDefault();
        token.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
    }
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(remembered("theme") ?? (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => { if (!remembered("theme")) setTheme(dark.matches ? "dark" : "light"); });
  setLanguage(remembered("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en"));
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(root.dataset.theme === "dark" ? "light" : "dark");
    remember("theme", root.dataset.theme);
  });
  document.getElementById("language").addEventListener("click", () => {
    setLanguage(root.dataset.language === "en" ? "zh" : "en");
    remember("language", root.dataset.language);
  });
  document.querySelectorAll(".strip").forEach(wireStrip);

  // Charts are drawn when they come near the window, so that a long page opens at once.
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      watcher.unobserve(target);
      draw(target);
    }
  }, { rootMargin: "800px" });
  document.querySelectorAll("figure.chart").forEach((figure) => watcher.observe(figure));
})();
