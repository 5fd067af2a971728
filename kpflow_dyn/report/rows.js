"use strict";
// The numbers of a view as rows of text, the first of which are their names: for the table below a figure, and for CSV.
// Views are in single precision, which is good to seven digits.
const rowsOf = (() => {
  const TYPES = {
    f4: Float32Array, f8: Float64Array, i1: Int8Array, i2: Int16Array, i4: Int32Array, u1: Uint8Array, u2: Uint16Array,
    u4: Uint32Array,
  };
  const decoded = (values) => {
    if (values === undefined || values.bdata === undefined) return (values || []).flat();
    const bytes = Uint8Array.from(atob(values.bdata), (letter) => letter.charCodeAt(0));
    return new TYPES[values.dtype](bytes.buffer);
  };
  const plain = (text) => String(text).replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  // What is not finite is left blank.
  const text = (value, digits) => {
    if (typeof value !== "number") return plain(value ?? "");
    if (!Number.isFinite(value)) return "";
    return String(Number.isInteger(value) ? value : Number(value.toPrecision(digits)));
  };
  const texts = (values, digits) => Array.from(decoded(values), (value) => text(value, digits));
  // Along an axis, with as many digits more as it takes to tell the values apart.
  const places = (values, digits) => {
    const known = Array.from(decoded(values)).filter((value) => Number.isFinite(value));
    const count = new Set(known).size;
    while (digits < 17 && new Set(texts(known, digits)).size < count) digits += 1;
    return texts(values, digits);
  };
  const titleOf = (view, axis, otherwise) => plain(view.layout[axis]?.title?.text || otherwise);
  const axisOf = (name) => name.replace(/^[xy]/, "$&axis");

  const mapRows = (view, trace, digits) => {
    const [x, y] = [trace.x, trace.y].map((values) => places(values, digits));
    const z = texts(trace.z, digits);
    const header = [titleOf(view, "yaxis", "y"), titleOf(view, "xaxis", "x"), plain(trace.colorbar?.title?.text || "value")];
    return [header, ...z.map((value, i) => [y[Math.floor(i / x.length)], x[i % x.length], value])];
  };

  // Bars of one length are two standard errors; others end at the least and at the largest value.
  const barsOf = (error, name) => {
    if (!error) return [];
    if (error.symmetric !== false) return [[`${name}: 2 standard errors`, error.array]];
    return [[`${name}: down to the least`, error.arrayminus], [`${name}: up to the largest`, error.array]];
  };
  // The columns of a trace, each with its name and the text of its cells; what is the same in all of them comes first.
  const lineColumns = (view, trace, digits) => {
    const [xaxis, yaxis] = [axisOf(trace.xaxis || "x"), axisOf(trace.yaxis || "y")];
    const panel = view.layout.meta?.x; // where there are panels, their axes are titled by what differs
    const [x, y] = [panel ? plain(panel) : titleOf(view, xaxis, "x"), titleOf(view, yaxis, "y")];
    const along = places(trace.x, digits);
    const same = (text) => along.map(() => plain(text));
    const columns = [["series", same(trace.name)]];
    if (panel) columns.push(["panel", same(titleOf(view, xaxis, ""))]);
    if (trace.text) columns.push(["name", texts(trace.text, digits)]);
    columns.push([x, along], [y, texts(trace.y, digits)]);
    const bars = [...barsOf(trace.error_x, x), ...barsOf(trace.error_y, y)];
    columns.push(...bars.map(([name, values]) => [name, texts(values, digits)]));
    if (trace.meta?.customdata) columns.push([trace.meta.customdata, texts(trace.customdata, digits)]);
    return unique(columns);
  };
  // A name that is taken gets a number: "series", "series (2)".
  const unique = (columns) => {
    const named = new Map();
    for (const [name, cells] of columns) {
      let free = name;
      for (let count = 2; named.has(free); count += 1) free = `${name} (${count})`;
      named.set(free, cells);
    }
    return named;
  };
  const lineRows = (view, traces, digits) => {
    const found = traces.map((trace) => lineColumns(view, trace, digits));
    const header = [...new Set(found.flatMap((columns) => [...columns.keys()]))];
    const rows = found.flatMap((columns) =>
      columns.get("series").map((_, i) => header.map((name) => columns.get(name)?.[i] ?? "")),
    );
    return [header, ...rows];
  };

  return (view, digits) => {
    const traces = view.data.filter((trace) => trace.hoverinfo !== "skip");
    return traces[0].type === "heatmap" ? mapRows(view, traces[0], digits) : lineRows(view, traces, digits);
  };
})();

// As RFC 4180 has it.
const csvOf = (rows) => {
  const field = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  return rows.map((row) => row.map(field).join(",") + "\r\n").join("");
};
