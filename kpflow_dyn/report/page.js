"use strict";
(() => {
  const colorway = JSON.parse(document.getElementById("colorway").textContent);
  const root = document.documentElement;
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const SAVED = 760; // pixels: the width of saved pictures
  const PRINTED = 660; // and of pictures on paper, two of which fit on a page
  const LOWER = 0.62;
  const NARROW = 480;
  const PANEL = 150; // the least width of one of several panels
  const ROWS = 20; // of the table below a figure

  const scales = () => {
    const [low, high] = colorway[root.dataset.look];
    return { diverging: [[0, low], [0.5, color("--card")], [1, high]], sequential: "Cividis" };
  };

  // How high a legend becomes at this width, beyond its first line.
  const legendHeight = (view, width, size) => {
    const names = view.data.filter((trace) => trace.showlegend !== false && trace.type !== "heatmap").map((t) => t.name);
    if (names.length < 2) return 0;
    const across = Math.max(1, Math.floor((width - 60) / (50 + 0.55 * size * Math.max(...names.map((n) => n.length)))));
    return (Math.ceil(names.length / across) - 1) * 1.5 * size;
  };

  const panelsOf = (view) => Object.keys(view.layout).filter((name) => /^xaxis\d*$/.test(name)).length;
  const leastWidth = (view) => (panelsOf(view) > 1 ? panelsOf(view) * PANEL : 0);

  const isAxis = (name) => /^[xy]axis\d*$/.test(name);
  const ALL = { axes: {}, visible: [] };
  // What the reader sees of the view in a plot: the ranges zoomed to, by axis, and which traces are hidden.
  const seenIn = ({ layout, data }) => ({
    axes: Object.fromEntries(
      Object.entries(layout).filter(([name, { range, autorange }]) => isAxis(name) && range && autorange === false)
        .map(([name, { range }]) => [name, { range: [...range], autorange: false }]),
    ),
    visible: data.map((trace) => trace.visible),
  });

  // A view as it looks now: the page's colours in the place of what the view leaves open, and the part that is seen.
  const dressed = (view, seen, least, width, narrow) => {
    const size = narrow ? 12 : 13;
    const series = colorway[root.dataset.look];
    const axis = (own) => ({
      gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--soft"), automargin: true, ...own,
    });
    const layout = {
      ...view.layout, height: least + legendHeight(view, width, size), colorway: series,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: narrow ? false : "zoom",
      font: { family: "inherit", size, color: color("--text") },
      margin: { l: 10, r: 10, t: 10, b: 10, pad: 2 }, hovermode: "closest",
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--soft"), activecolor: color("--accent") },
      hoverlabel: { bgcolor: color("--page"), bordercolor: color("--line"), font: { color: color("--text") } },
    };
    for (const name of Object.keys(view.layout).concat("xaxis", "yaxis")) {
      if (isAxis(name)) layout[name] = { ...axis(view.layout[name]), ...seen.axes[name] };
    }
    const data = view.data.map((original, number) => {
      const trace = { ...original, visible: seen.visible[number] ?? true };
      const meta = trace.meta || {};
      if (meta.scale) {
        const bar = { ...trace.colorbar, thickness: narrow ? 8 : 12, outlinewidth: 0 };
        return { ...trace, colorscale: scales()[meta.scale], colorbar: bar };
      }
      if (meta.color === undefined) return trace;
      const own = series[meta.color];
      return { ...trace, line: { color: own, ...trace.line }, marker: { color: own, ...trace.marker } };
    });
    return { data, layout };
  };

  // What `make` gives while the page has this look; nothing is painted in between.
  const inLook = (look, make) => {
    const now = root.dataset.look;
    root.dataset.look = look;
    const made = make();
    root.dataset.look = now;
    return made;
  };

  const pictureOf = (view, seen, least, kind) => {
    const width = Math.max(SAVED, leastWidth(view));
    const { data, layout } = inLook("light", () => dressed(view, seen, least, width, false));
    Object.assign(layout, { paper_bgcolor: "#fff", plot_bgcolor: "#fff" });
    layout.font.family = "Arial, Helvetica, sans-serif";
    return Plotly.toImage({ data, layout }, { format: kind, width, height: layout.height, scale: kind === "png" ? 2 : 1 });
  };

  const save = (url, name) => {
    const link = document.createElement("a");
    link.href = url;
    link.download = name;
    link.click();
  };

  const slug = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "");

  // At most ROWS of the rows, evenly.
  const tableOf = (rows) => {
    const [header, ...body] = rows;
    const table = document.createElement("table");
    const add = (row, name, parent) => {
      const line = parent.insertRow();
      for (const text of row) {
        const cell = line.appendChild(document.createElement(name));
        cell.textContent = text;
        if (name === "th") cell.scope = "col";
      }
    };
    add(header, "th", table.createTHead());
    const few = body.length <= ROWS;
    const shown = few ? body : Array.from({ length: ROWS }, (_, i) => body[Math.round((i * (body.length - 1)) / (ROWS - 1))]);
    for (const row of shown) add(row, "td", table.tBodies[0] || table.createTBody());
    const said = document.createElement("p");
    said.className = "note";
    said.textContent = few ? "" : `${ROWS} of ${body.length.toLocaleString("en")} rows; the CSV file has all.`;
    return [table, said];
  };

  const charts = [...document.querySelectorAll("figure[data-height]")].map((element) => {
    const views = JSON.parse(element.querySelector("script").textContent);
    const choices = [...element.querySelectorAll("select")];
    const target = element.querySelector(".plot");
    const numbers = element.querySelector(".numbers");
    const finding = element.querySelector(".finding");
    const least = Number(element.dataset.height);
    const title = element.querySelector("h3").textContent;
    const viewNow = () => views[choices.map((choice) => choice.value).join(",")];
    const nameNow = () => {
      const chosen = choices.map((choice) => choice.selectedOptions[0].text);
      return [document.title, element.id, ...chosen].map(slug).filter(Boolean).join("_");
    };

    const tabulate = () => {
      numbers.querySelector(".scroll")?.remove();
      if (!numbers.open) return;
      const area = numbers.appendChild(document.createElement("div"));
      Object.assign(area, { className: "scroll", tabIndex: 0 });
      area.setAttribute("role", "region");
      area.setAttribute("aria-label", `Numbers of ${title}`);
      area.append(...tableOf(rowsOf(viewNow(), 5)));
    };

    let drawn = null; // the view that the plot shows
    const draw = (width) => {
      const view = viewNow();
      const seen = view === drawn ? seenIn(target) : ALL;
      drawn = view;
      if (finding && finding.textContent !== view.finding) finding.textContent = view.finding;
      target.style.minWidth = `${leastWidth(view)}px`;
      const frame = target.parentElement;
      if (leastWidth(view) > frame.clientWidth) frame.tabIndex = 0; // it scrolls, by arrow keys too
      else frame.removeAttribute("tabindex");
      const narrow = !width && element.clientWidth < NARROW;
      const { data, layout } = dressed(view, seen, width ? LOWER * least : least, width || target.clientWidth, narrow);
      if (width) layout.width = width;
      const config = {
        responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
        modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
      };
      Plotly.react(target, data, layout, config);
      if (width) Plotly.react(target, data, { ...layout }, config); // the first leaves titles of colour bars where they were
      for (const svg of target.querySelectorAll(".main-svg")) svg.setAttribute("aria-hidden", "true");
      tabulate();
    };

    const files = {
      csv: () => URL.createObjectURL(new Blob([csvOf(rowsOf(viewNow(), 7))], { type: "text/csv" })),
      png: () => pictureOf(viewNow(), seenIn(target), least, "png"),
      svg: () => pictureOf(viewNow(), seenIn(target), least, "svg"),
    };
    for (const choice of choices) choice.addEventListener("change", () => draw());
    for (const button of element.querySelectorAll("[data-kind]")) {
      const kind = button.dataset.kind;
      button.addEventListener("click", async () => save(await files[kind](), `${nameNow()}.${kind}`));
    }
    numbers.addEventListener("toggle", tabulate);
    return draw;
  });

  const drawAll = (width) => {
    for (const draw of charts) draw(width);
  };
  const button = document.getElementById("look");
  const look = (name) => {
    root.dataset.look = name;
    button.textContent = name === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `${button.textContent} look`);
    drawAll();
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  button.addEventListener("click", () => look(root.dataset.look === "dark" ? "light" : "dark"));
  system.addEventListener("change", () => look(system.matches ? "dark" : "light"));
  look(root.dataset.look);

  // On paper: light, and as wide as paper is.
  let before = root.dataset.look;
  addEventListener("beforeprint", () => {
    before = root.dataset.look;
    root.dataset.look = "light";
    drawAll(PRINTED);
  });
  addEventListener("afterprint", () => look(before));
})();
