"use strict";
(() => {
  const colorway = JSON.parse(document.getElementById("colorway").textContent);
  const root = document.documentElement;
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  const scales = () => {
    const [low, high] = colorway[root.dataset.look];
    return {
      diverging: [[0, low], [0.5, color("--card")], [1, high]],
      sequential: "Cividis",
    };
  };

  // A view as it looks now: the page's colours, in the place of what the view leaves open.
  const dressed = (view, height, narrow) => {
    const series = colorway[root.dataset.look];
    const axis = (own) => ({
      gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--soft"), automargin: true, ...own,
    });
    const layout = {
      ...view.layout, height, colorway: series, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "inherit", size: narrow ? 11 : 13, color: color("--text") },
      margin: { l: 10, r: 10, t: 10, b: 10, pad: 2 }, hovermode: "closest",
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--soft"), activecolor: color("--accent") },
      hoverlabel: { bgcolor: color("--page"), bordercolor: color("--line"), font: { color: color("--text") } },
    };
    for (const name of Object.keys(view.layout).concat("xaxis", "yaxis")) {
      if (/^[xy]axis\d*$/.test(name)) layout[name] = axis(view.layout[name]);
    }
    const data = view.data.map((trace) => {
      const meta = trace.meta || {};
      if (meta.scale) return { ...trace, colorscale: scales()[meta.scale] };
      if (meta.color === undefined) return trace;
      const own = series[meta.color];
      return { ...trace, line: { color: own, ...trace.line }, marker: { color: own, ...trace.marker } };
    });
    return { data, layout };
  };

  const charts = [...document.querySelectorAll("figure[data-height]")].map((element) => {
    const views = JSON.parse(element.querySelector("script").textContent);
    const choices = [...element.querySelectorAll("select")];
    const target = element.querySelector(".plot");
    const draw = () => {
      const view = views[choices.map((choice) => choice.value).join(",")];
      const narrow = target.clientWidth < 480;
      const { data, layout } = dressed(view, Number(element.dataset.height), narrow);
      return Plotly.react(target, data, layout, { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover" });
    };
    for (const choice of choices) choice.addEventListener("change", draw);
    return draw;
  });

  const button = document.getElementById("look");
  const look = (name) => {
    root.dataset.look = name;
    button.textContent = name === "dark" ? "Light" : "Dark";
    for (const draw of charts) draw();
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  button.addEventListener("click", () => look(root.dataset.look === "dark" ? "light" : "dark"));
  system.addEventListener("change", () => look(system.matches ? "dark" : "light"));
  look(system.matches ? "dark" : "light");
})();
