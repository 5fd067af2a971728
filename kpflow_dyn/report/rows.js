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
  const titleOf = (view, axis, otherwise) => plain(view.layout[axis]?.title?.text || otherwise);
  const axisOf = (name) => name.replace(/^[xy]/, "$&axis");

  const mapRows = (view, trace, digits) => {
    const [x, y, z] = [trace.x, trace.y, trace.z].map((values) => texts(values, digits));
    const header = [titleOf(view, "yaxis", "y"), titleOf(view, "xaxis", "x"), plain(trace.colorbar?.title?.text || "value")];
    return [header, ...z.map((value, i) => [y[Math.floor(i / x.length)], x[i % x.length], value])];
  };

  // Bars of one length are two standard errors; others end at the least and at the largest value.
  const barsOf = (error, name) => {
    if (!error) return [];
    if (error.symmetric !== false) return [[`${name}: 2 standard errors`, error.array]];
    return [[`${name}: down to the least`, error.arrayminus], [`${name}: up to the largest`, error.array]];
  };
  const lineColumns = (view, trace) => {
    const [xaxis, yaxis] = [axisOf(trace.xaxis || "x"), axisOf(trace.yaxis || "y")];
    const panel = view.layout.meta?.x; // where there are panels, their axes are titled by what differs
    const [x, y] = [panel ? plain(panel) : titleOf(view, xaxis, "x"), titleOf(view, yaxis, "y")];
    const columns = [[x, trace.x], [y, trace.y], ...barsOf(trace.error_x, x), ...barsOf(trace.error_y, y)];
    if (trace.text) columns.unshift(["name", trace.text]);
    if (trace.meta?.customdata) columns.push([trace.meta.customdata, trace.customdata]);
    return { same: [["series", plain(trace.name)], ...(panel ? [["panel", titleOf(view, xaxis, "")]] : [])], columns };
  };
  const lineRows = (view, traces, digits) => {
    const found = traces.map((trace) => lineColumns(view, trace));
    const header = [...new Set(found.flatMap(({ same, columns }) => [...same, ...columns].map(([name]) => name)))];
    const rows = found.flatMap(({ same, columns }) => {
      const cells = new Map(columns.map(([name, values]) => [name, texts(values, digits)]));
      const fixed = new Map(same);
      const points = Array.from(cells.values().next().value.keys());
      return points.map((i) => header.map((name) => fixed.get(name) ?? cells.get(name)?.[i] ?? ""));
    });
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
