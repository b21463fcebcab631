// Draws, with Vega, what formulas.js computes and what was measured.
const data = JSON.parse(document.getElementById("data").textContent);
const GLYPHS = {s: "■", "^": "▲", v: "▼", D: "◆", "<": "◀", o: "●", "*": "★", P: "✚"};
const OPEN = {s: "□", d: "◇", o: "○", ">": "▷"};  // of a dashed line
const STAR = "M0,-1L.235,-.324L.951,-.309L.38,.124L.588,.809L0,.4L-.588,.809L-.38,.124L-.951,-.309L-.235,-.324Z";
const SYMBOLS = {s: "square", "^": "triangle-up", v: "triangle-down", D: "diamond", d: "diamond", "<": "triangle-left",
  ">": "triangle-right", o: "circle", "*": STAR, P: "cross"};
const IN_THE_DARK = {"#000000": "#ffffff", "#777777": "#b0b0b0"};
const methods = Object.entries(data.methods).map(([name, look]) => ({name, ...look, symbol: SYMBOLS[look.marker]}));
for (const method of methods) {
  const {name, colour} = method;
  method.glyph = (method.line === "-" ? GLYPHS : OPEN)[method.marker];
  document.documentElement.style.setProperty(`--${name}`, `light-dark(${colour}, ${IN_THE_DARK[colour] ?? colour})`);
}
const looks = Object.fromEntries(methods.map(m => [m.name, {...m, colour: `var(--${m.name})`,
  fill: m.line === "-" ? `var(--${m.name})` : "var(--card)", dash: m.line === "-" ? [1, 0] : [3, 3]}]));

const range = (low, step, count) => Array.from({length: count}, (_, i) => Number((low + i * step).toFixed(6)));

const AXIS = {labelColor: "currentColor", titleColor: "currentColor", domainColor: "currentColor",
  tickColor: "currentColor", gridColor: "var(--line)", labelFontSize: 12, titleFontSize: 13, titleFontWeight: "normal"};
const CONFIG = {background: null, font: "system-ui, sans-serif", axis: AXIS,
  view: {stroke: null}, title: {color: "currentColor", fontSize: 13, fontWeight: "normal"}};

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

async function embed(place, spec, size) {
  const {view} = await vegaEmbed(place, {background: null, config: CONFIG, description: place.dataset.label, ...spec},
    {renderer: "svg", actions: false});
  new ResizeObserver(() => {
    const [width, height] = size(place.clientWidth);
    if (view.width() !== width) view.width(width).height(height).runAsync();
  }).observe(place);
  return view;
}

const FIT = {type: "fit", contains: "padding"};
const POWERS = {grid: false, values: range(-9, 1, 11).map(power => 10 ** power),
  labelExpr: '["10⁻⁹","10⁻⁸","10⁻⁷","10⁻⁶","10⁻⁵","10⁻⁴","10⁻³","0.01","0.1","1","10"][round(log(datum.value) / LN10) + 9]'};

const square = width => Array(2).fill(Math.max(200, Math.min(420, width - 60)));
const wide = width => [Math.max(240, Math.min(480, width)), 260];  // with the axes

/** A panel's section, and a redraw that never runs twice at once; `data-state` says when it is through. */
function panel(id, draw) {
  const section = document.getElementById(id);
  let busy = false, again = false;
  async function redraw() {
    again = true;
    section.dataset.state = "drawing";
    if (busy) return;
    for (busy = true; again;) {
      again = false;
      const start = performance.now();
      await draw();
      section.dataset.redrawMs = performance.now() - start;
    }
    busy = false;
    section.dataset.state = "drawn";
  }
  return {section, form: section.querySelector("form"), redraw, plots: [...section.querySelectorAll(".plot")]};
}

/** A slider over a list of values. */
function slider({form, section, redraw}, name, label, values, value, show = String) {
  const input = element("input", {type: "range", id: `${section.id}-${name}`, min: 0, max: values.length - 1, step: 1});
  const shown = element("output", {for: input.id});
  form.append(element("label", {class: "slider", for: input.id}, element("span", {}, label), shown, input));
  const control = {values, get index() { return +input.value; }, get value() { return values[input.value]; },
    set(wanted) {  // the nearest value
      input.value = values.reduce((best, v, i) => Math.abs(v - wanted) < Math.abs(values[best] - wanted) ? i : best, 0);
      said();
    }};
  function said() {
    shown.value = show(control.value);
    input.setAttribute("aria-valuetext", `${label} ${shown.value}`);
  }
  control.set(value);
  input.addEventListener("input", () => { said(); redraw(); });
  return control;
}

function checkbox(parent, redraw, id, label, checked) {
  const input = element("input", {type: "checkbox", id});
  input.checked = checked;
  input.addEventListener("change", redraw);
  parent.append(element("label", {for: id}, input, " ", ...label));
  return input;
}

const marked = look => [element("span", {class: "mark", style: `color: ${look.colour}`, "aria-hidden": "true"},
  look.glyph), look.label];

/** A checkbox a method: which are shown. */
function switches({form, section, redraw}, names) {
  const set = element("fieldset", {}, element("legend", {}, "Shown"));
  const boxes = names.map(name => [name, checkbox(set, redraw, `${section.id}-show-${name}`, marked(looks[name]), true)]);
  form.append(set);
  return {has: name => boxes.some(([other, box]) => other === name && box.checked),
    get names() { return boxes.filter(([, box]) => box.checked).map(([name]) => name); }};
}

/** A table's rows; each number stands in full in its cell's `data-value`. */
function tabulate(section, rows) {
  section.querySelector("tbody").replaceChildren(...rows.map(({id, label, cells, off}) =>
    element("tr", {id: `${section.id}-${id}`, ...(off && {class: "off"})}, element("th", {scope: "row"}, ...label),
      ...cells.map(([values, text]) => element("td", {"data-value": values.join(" ")}, text)))));
}

const fixed = (x, digits) => Number.isFinite(x) ? x.toFixed(digits).replace("-", "−") : "–";
const one = x => fixed(x, 1), two = x => fixed(x, 2);
const precise = x => Number.isFinite(x) ? (x !== 0 && Math.abs(x) < 0.001 ? x.toExponential(1) : x.toPrecision(3)).replaceAll("-", "−") : "–";
const angle = ([a, b], [c, d]) => norm([a, b]) && norm([c, d])
  ? Math.atan2(Math.abs(a * d - b * c), a * c + b * d) * 180 / Math.PI : NaN;
const error = (found, [a, b]) => norm([found[0] - a, found[1] - b]) / norm([a, b]);

/** Its numbers stand in the table, so its marks say nothing to screen readers. Contours of a grid that is one node wider on each side than the plot, arrows, and a point to drag. */
function plane(domains, nodes, titles) {
  const cell = `width / ${nodes - 1}`, at = (x, y, more) => ({x: {scale: "x", field: x}, y: {scale: "y", field: y}, ...more});
  return {
    $schema: "https://vega.github.io/schema/vega/v6.json", width: 400, height: 400, autosize: "pad",
    signals: [{name: "levels", value: []}, {name: "picked", value: null, on: [{
      events: "@surface:pointerdown, [@surface:pointerdown, window:pointerup] > window:pointermove!",
      update: "[invert('x', x()), invert('y', y())]"}]}],
    data: [{name: "grid"}, {name: "arrows"}, {name: "point"}, {name: "paths"}, {name: "ends"}, {name: "optimum"},
      {name: "contours", source: "grid", transform: [
        {type: "isocontour", field: "grid", thresholds: {signal: "levels"}, scale: {signal: cell}}]}],
    scales: [{name: "x", domain: domains[0], range: "width", zero: false},
      {name: "y", domain: domains[1], range: "height", zero: false}],
    axes: [{scale: "x", orient: "bottom", title: titles[0], tickCount: 5},
      {scale: "y", orient: "left", title: titles[1], tickCount: 5}],
    marks: [{type: "group", name: "surface", clip: true,
      encode: {update: {width: {signal: "width"}, height: {signal: "height"}, fill: {value: "transparent"}}},
      marks: [
        {type: "group", interactive: false,
          encode: {update: {x: {signal: `-1.5 * ${cell}`}, y: {signal: `-1.5 * ${cell}`}}},
          marks: [{type: "path", from: {data: "contours"}, aria: false, interactive: false,
            encode: {update: {stroke: {value: "var(--contour)"}, strokeWidth: {value: 0.8}}},
            transform: [{type: "geopath", field: "datum.contour"}]}]},
        {type: "group", from: {facet: {name: "path", data: "paths", groupby: "name"}}, aria: false, interactive: false,
          marks: [{type: "line", from: {data: "path"}, aria: false, interactive: false, encode: {update: at("x", "y", {
            stroke: {field: "colour"}, strokeWidth: {field: "wide"}, strokeDash: {field: "dash"}})}}]},
        {type: "symbol", from: {data: "ends"}, aria: false, interactive: false, encode: {update: at("x", "y", {
          shape: {field: "symbol"}, fill: {value: "transparent"}, stroke: {field: "colour"}, strokeWidth: {value: 2},
          size: {value: 110}})}},
        ...[300, 60].map(size => ({type: "symbol", from: {data: "optimum"}, aria: false, interactive: false, encode: {
          update: at("x", "y", {stroke: {value: "currentColor"}, strokeWidth: {value: 1.5}, size: {value: size}})}})),
        {type: "rule", from: {data: "arrows"}, aria: false, interactive: false, encode: {update: at("x", "y", {
          x2: {scale: "x", field: "x2"}, y2: {scale: "y", field: "y2"}, stroke: {field: "colour"},
          strokeWidth: {field: "wide"}})}},
        {type: "symbol", from: {data: "arrows"}, aria: false, interactive: false, encode: {update: at("hx", "hy", {
          shape: {field: "symbol"}, fill: {field: "colour"}, size: {value: 90}, stroke: {value: "var(--card)"},
          strokeWidth: {value: 0.7}})}},
        {type: "symbol", from: {data: "point"}, aria: false, interactive: false, encode: {update: at("x", "y", {
          fill: {value: "var(--paper)"}, stroke: {value: "currentColor"}, strokeWidth: {value: 2}, size: {value: 80}})}}]}]};
}

/** Arrows from a point, so that those which coincide are all seen: the first the widest, and heads one behind the other. */
function arrows([x, y], named, span) {
  const near = 0.03 * span, tips = named.map(({vector}) => vector);
  return named.map(({name, vector: [u, v]}, index) => {
    const alike = tips.map(([a, b]) => Math.hypot(a - u, b - v) < near), long = Math.hypot(u, v);
    const before = alike.slice(0, index).filter(Boolean).length, after = alike.slice(index + 1).filter(Boolean).length;
    const head = 1 - (long && Math.min(0.85, before * near / long));
    return {x, y, x2: x + u, y2: y + v, hx: x + head * u, hy: y + head * v, ...looks[name], wide: 2 + 1.5 * after};
  });
}

/** Where a method leads: steps against its field of `nodes` × `nodes` vectors, bilinear between them, in units of their
 * distance. Steps are linearly implicit, θ − τ (I + τJ)⁻¹ g with τ = long / ‖g‖: along the flow where it is far from its
 * end, and Newton's at the end. The path ends there, or where the field does. */
function descent(nodes, vector, start, long = (nodes - 1) / 80) {
  const path = [start], inside = x => x >= 0 && x <= nodes - 1;
  for (let step = 0, [u, v] = start; step < 500 && inside(u) && inside(v); step++) {
    const [i, j] = [u, v].map(x => Math.min(nodes - 2, Math.floor(x))), s = u - i, t = v - j;
    const [p, q, r, w] = [vector(i, j), vector(i + 1, j), vector(i, j + 1), vector(i + 1, j + 1)];
    const mean = (at, a, b) => b.map((x, k) => (1 - at) * a[k] + at * x), less = (a, b) => a.map((x, k) => x - b[k]);
    const g = mean(t, mean(s, p, q), mean(s, r, w));
    const [by_u, by_v] = [mean(t, less(q, p), less(w, r)), mean(s, less(r, p), less(w, q))];
    const tau = long / norm(g), [a, b, c, d] = [1 + tau * by_u[0], tau * by_v[0], tau * by_u[1], 1 + tau * by_v[1]];
    let move = [d * g[0] - b * g[1], a * g[1] - c * g[0]].map(x => tau * x / (a * d - b * c));
    if (!(norm(move) <= long && move[0] * g[0] + move[1] * g[1] > 0)) move = g.map(x => tau * x);
    if (!(norm(move) > 1e-6)) break;
    path.push([u -= move[0], v -= move[1]]);
  }
  return path;
}

/** Contours that part the nodes into parts of equal number. */
function contour(view, width, values) {
  const sorted = Float64Array.from(values).sort();
  view.signal("levels", range(1, 1, 15).map(i => sorted[Math.floor(i * sorted.length / 16)]));
  view.data("grid", [{grid: {width, height: values.length / width, values}}]);
}

/** A plane whose point follows the pointer, by the sliders of its coordinates. */
async function draggable({plots: [place], redraw}, spec, first, second) {
  const view = await embed(place, spec, square);
  place.classList.add("draggable");
  view.addSignalListener("picked", (_, [u, v]) => { first.set(u); second.set(v); redraw(); });
  return view;
}

async function curvature() {
  const G = [0.1, -0.1], LOW = -0.4, HIGH = 1, NODES = 43, LONG = 1.5, step = (HIGH - LOW) / (NODES - 1);
  const axis = range(LOW - step, step, NODES + 2);
  let view;
  const here = panel("curvature", async () => {
    const [A, B, C] = [a.value, b.value, c.value], x = [x1.value, x2.value];
    const f = (u, v) => 0.5 * (A * (u - .5) ** 2 + 2 * B * (u - .5) * (v - .5) + C * (v - .5) ** 2) + G[0] * u + G[1] * v;
    const gradient = [A * (x[0] - .5) + B * (x[1] - .5) + G[0], B * (x[0] - .5) + C * (x[1] - .5) + G[1]];
    contour(view, NODES + 2, [...axis].reverse().flatMap(v => axis.map(u => f(u, v))));
    const named = [["maml", gradient], ["fomaml", G]].map(([name, v]) => ({name, vector: v.map(part => LONG * part)}));
    view.data("arrows", arrows(x, named, HIGH - LOW)).data("point", [{x: x[0], y: x[1]}]);
    await view.runAsync();
    const pair = v => [v, `(${fixed(v[0], 3)}, ${fixed(v[1], 3)})`];
    tabulate(here.section, [
      {id: "gradient", label: marked({...looks.maml, label: "∇f(x)"}), cells: [pair(gradient)]},
      {id: "first-order", label: marked({...looks.fomaml, label: "∇f with C = 0"}), cells: [pair(G)]},
      {id: "angle", label: ["angle between them"], cells: [[[angle(G, gradient)], `${fixed(angle(G, gradient), 1)}°`]]},
      {id: "error", label: ["relative error"], cells: [[[error(G, gradient)], `${fixed(100 * error(G, gradient), 1)} %`]]}]);
  });
  const [before, after] = data.curvature, told = (key, show) => `from ${show(before[key])} to ${show(after[key])}`;
  document.getElementById("curvature-measured").textContent = "Has it a say after training? Measured on MNIST-1D in " +
    `${after.step} meta-steps: the norm of the support loss's Hessian at θ goes ${told("curvature/hessian", precise)}, ` +
    `the relative error of FO-MAML's direction ${told("curvature/fomaml_error", two)}.`;
  const bend = range(-1, 0.01, 201), place = range(LOW, 0.01, 141);
  const a = slider(here, "a", "a", bend, 0.5, two), b = slider(here, "b", "b", bend, -0.1, two);
  const c = slider(here, "c", "c", bend, 0, two);
  const x1 = slider(here, "x1", "x₁", place, 0.3, two), x2 = slider(here, "x2", "x₂", place, 0.1, two);
  const flat = element("button", {type: "button", id: "curvature-flat"}, "Set C = 0");
  flat.addEventListener("click", () => { for (const control of [a, b, c]) control.set(0); here.redraw(); });
  here.form.append(flat);
  view = await draggable(here, plane([[LOW, HIGH], [LOW, HIGH]], NODES, ["x₁", "x₂"]), x1, x2);
  await here.redraw();
}

function unpack(text) {
  return new Float32Array(Uint8Array.from(atob(text), character => character.charCodeAt(0)).buffer);
}

async function compare() {
  const {lams, steps, nus, axes, optima, tasks, inner_lr} = data.compare, nodes = axes[0].length, LONG = 0.5;
  const spacing = axes[0][1] - axes[0][0], placed = point => point.map((x, k) => axes[k][0] + spacing * x);
  const names = Object.keys(ESTIMATORS), others = names.filter(name => name !== "exact");
  const losses = unpack(data.compare.loss), across = nodes + 2, known = new Map();
  let view;
  /** A meta-gradient at a node of the grid, kept: paths come by again and again. */
  function at_node(name, at, i, j) {
    const key = [name, at.lam, ...(name === "exact" ? [] : [at.steps, at.nu]), i, j].join();
    if (!known.has(key)) known.set(key, meta_gradient(name, tasks, placed([i, j]), at));
    return known.get(key);
  }
  const here = panel("compare", async () => {
    const at = {lam: lam.value, steps: inner.value, nu: nu.value, lr: inner_lr}, theta = [t1.value, t2.value];
    const start = theta.map((x, k) => (x - axes[k][0]) / spacing);
    const found = Object.fromEntries(names.map(name => [name, meta_gradient(name, tasks, theta, at)]));
    const ways = Object.fromEntries(names.map(name => [name,
      descent(nodes, (i, j) => at_node(name, at, i, j), start).map(placed)]));
    const exact = found.exact;
    contour(view, across, losses.subarray(lam.index * across ** 2, (lam.index + 1) * across ** 2));
    view.data("point", [{x: theta[0], y: theta[1]}]);
    view.data("arrows", arrows(theta, shown.names.filter(name => norm(found[name])).map(name => {
      const long = true_length.checked ? Math.min(3, norm(found[name]) / norm(exact)) : 1;
      return {name, vector: found[name].map(part => -LONG * long * part / norm(found[name]))};
    }), spacing * (nodes - 1)));
    const paths = downhill.checked ? shown.names.map(name => ways[name].map(([x, y]) => (
      {x, y, name, ...looks[name], wide: name === "exact" ? 4 : 1.5}))) : [];
    view.data("paths", paths.flat()).data("ends", paths.map(path => path.at(-1)));
    view.data("optimum", [{x: optima[lam.index][0], y: optima[lam.index][1]}]);
    await view.runAsync();
    tabulate(here.section, Object.entries(found).map(([name, vector]) => ({id: name, label: marked(looks[name]),
      off: !shown.has(name), cells: [[[angle(vector, exact)], `${fixed(angle(vector, exact), 1)}°`],
        [[error(vector, exact)], precise(error(vector, exact))], [vector, precise(norm(vector))],
        [ways[name].at(-1), ended(ways[name].at(-1), optima[lam.index])]]})));
    bias_map(lams.map(l => {
      const goal = meta_gradient("exact", tasks, theta, {...at, lam: l});
      return steps.map(k => error(meta_gradient(of.value, tasks, theta, {...at, lam: l, steps: k}), goal));
    }));
  });
  /** The relative error of one method, by λ and K. */
  function bias_map(errors) {
    const table = document.getElementById("compare-map");
    table.caption.textContent = `Relative error of ${looks[of.value].label} by λ and K, at this θ and ν`;
    table.tHead.replaceChildren(element("tr", {}, element("th", {scope: "col"}, "λ"),
      ...steps.map(k => element("th", {scope: "col"}, `K = ${k}`))));
    table.tBodies[0].replaceChildren(...errors.map((line, l) => element("tr", {},
      element("th", {scope: "row"}, String(lams[l])), ...line.map((x, k) => element("td", {"data-value": x,
        style: `--bias: ${Math.max(0, Math.min(30, 6 * (Math.log10(x) + 4)))}%`,
        ...(l === lam.index && k === inner.index && {class: "now"})}, precise(x))))));
  }
  const ended = (end, goal) => end.every((x, k) => x >= axes[k][0] && x <= axes[k].at(-1))
    ? two(norm([end[0] - goal[0], end[1] - goal[1]])) : "off the map";
  const lam = slider(here, "lam", "λ, strength of the proximal term", lams, 0.25);
  const inner = slider(here, "steps", "K, inner steps", steps, 10);
  const nu = slider(here, "nu", "ν, perturbation (FO-B-MAML)", nus, 0.1);
  const [along1, along2] = axes.map(axis => range(axis[0], 0.01, Math.round((axis.at(-1) - axis[0]) / 0.01) + 1));
  const t1 = slider(here, "theta1", "θ₁ (w₁)", along1, 2, two);
  const t2 = slider(here, "theta2", "θ₂ (w₂)", along2, 1.5, two);
  const true_length = checkbox(here.form, here.redraw, "compare-lengths", ["lengths as they are (to three times the exact one)"], false);
  const downhill = checkbox(here.form, here.redraw, "compare-paths", ["paths downhill, each to its end"], true);
  const of = element("select", {id: "compare-of"}, ...others.map(name =>
    element("option", {value: name}, looks[name].label)));
  of.value = "symmetric";
  of.addEventListener("change", here.redraw);
  here.form.append(element("label", {for: of.id}, "Map of the bias: ", of));
  const shown = switches(here, ["exact", ...others]);
  view = await draggable(here, plane(axes.map(axis => [axis[0], axis.at(-1)]), nodes, ["θ₁", "θ₂"]), t1, t2);
  await here.redraw();
}

async function tradeoff() {
  const {nus, deltas, path, centre, tangent, points, errors} = data.tradeoff, names = ["forward", "symmetric", "central4"];
  const middle = [0, 1].map(i => (Math.min(...path.map(p => p[i])) + Math.max(...path.map(p => p[i]))) / 2);
  const half = 0.05 + Math.max(...[0, 1].map(i => Math.max(...path.map(p => Math.abs(p[i] - middle[i])))));
  const xy = ([x, y], more) => ({x, y, ...more});
  let solutions, bias;
  const here = panel("tradeoff", async () => {
    const index = delta.index * nus.length + nu.index, {plus, zero, minus} = points[index], now = errors[index];
    const through = (from, direction, kind) => [-1, 1].map(sign => xy(from.map((u, i) =>
      u + sign * 3 * half * direction[i] / norm(direction)), {kind}));
    solutions.data("lines", [...through(centre, tangent, "tangent"),
      ...through(minus, [plus[0] - minus[0], plus[1] - minus[1]], "secant")]);
    solutions.data("points", [xy(minus, {label: "φ₋ν"}), xy(zero, {label: "φ₀"}), xy(plus, {label: "φν"})]);
    bias.data("curves", names.flatMap(name => nus.map((x, i) => (
      {x, y: errors[delta.index * nus.length + i][name], method: name}))).filter(({y}) => y > 0));
    bias.data("now", names.map(name => ({x: nu.value, y: now[name], method: name})));
    await Promise.all([solutions.runAsync(), bias.runAsync()]);
    const angles = angle([plus[0] - minus[0], plus[1] - minus[1]], tangent);
    tabulate(here.section, [...names.map(name => ({id: name, label: marked(looks[name]), cells: [[[now[name]], precise(now[name])]]})),
      {id: "plus", label: ["φν"], cells: [[plus, `(${fixed(plus[0], 4)}, ${fixed(plus[1], 4)})`]]},
      {id: "minus", label: ["φ₋ν"], cells: [[minus, `(${fixed(minus[0], 4)}, ${fixed(minus[1], 4)})`]]},
      {id: "angle", label: ["angle of secant and tangent"], cells: [[[angles], `${fixed(angles, 2)}°`]]}]);
  });
  const nu = slider(here, "nu", "ν, perturbation", nus, 0.15, precise);
  const delta = slider(here, "delta", "δ, the solver's error", deltas, 0.003);
  const position = {x: {field: "x", type: "quantitative"}, y: {field: "y", type: "quantitative"}};
  const [px, py] = middle.map((m, i) => ({...position["xy"[i]], title: ["φ₁", "φ₂"][i],
    scale: {domain: [m - half, m + half], nice: false, zero: false}, axis: {tickCount: 4, grid: false}}));
  solutions = await embed(here.plots[0], {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: 400, height: 400, layer: [
      {data: {values: path.map((p, i) => xy(p, {i}))}, mark: {type: "line", aria: false, clip: true, stroke: "var(--contour)", strokeWidth: 3},
        encoding: {x: px, y: py, order: {field: "i"}}},
      {data: {name: "lines", values: []}, mark: {type: "line", aria: false, clip: true, strokeWidth: 1.5}, encoding: {x: px, y: py,
        stroke: {field: "kind", title: null, scale: {domain: ["tangent", "secant"], range: ["currentColor", "var(--symmetric)"]},
          legend: {orient: "top", labelColor: "currentColor", labelFontSize: 13}},
        strokeDash: {field: "kind", scale: {domain: ["tangent", "secant"], range: [[1, 0], [6, 4]]}, legend: {orient: "top"}}}},
      {data: {name: "points", values: []}, encoding: {x: px, y: py}, layer: [
        {mark: {type: "point", aria: false, clip: true, filled: true, size: 80, fill: "var(--symmetric)", opacity: 1}},
        {mark: {type: "text", aria: false, clip: true, dx: 16, dy: -10, fontSize: 14, fill: "currentColor"}, encoding: {text: {field: "label"}}}]}]},
    square);
  const [bx, by] = [["ν", [nus[0], nus.at(-1)]], ["bias, ‖g − ∇F‖ / ‖∇F‖", [1e-7, 10]]].map(([title, domain], i) => (
    {...position["xy"[i]], title, scale: {type: "log", domain, nice: false}, axis: POWERS}));
  const coloured = scale => ({field: "method", legend: null, scale: {domain: names, range: names.map(name => looks[name][scale])}});
  bias = await embed(here.plots[1], {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: 400, height: 260, autosize: FIT, layer: [
      {data: {name: "curves", values: []}, mark: {type: "line", aria: false, clip: true, strokeWidth: 2}, encoding: {x: bx, y: by, stroke: coloured("colour")}},
      {data: {name: "now", values: []}, encoding: {x: bx}, layer: [
        {mark: {type: "rule", aria: false, stroke: "currentColor", strokeDash: [2, 3]}},
        {mark: {type: "point", aria: false, clip: true, filled: true, size: 90, opacity: 1},
          encoding: {y: by, fill: coloured("colour"), shape: coloured("symbol")}}]}]}, wide);
  await here.redraw();
}

/** Curves and points that follow the pointer: `picked` is where it is, and whether it has just come down. */
function regression(low, high) {
  const at = {x: {scale: "x", field: "x"}, y: {scale: "y", field: "y"}};
  return {
    $schema: "https://vega.github.io/schema/vega/v6.json", width: 400, height: 400, autosize: "pad",
    signals: [{name: "picked", value: null, on: [{
      events: "@surface:pointerdown, [@surface:pointerdown, window:pointerup] > window:pointermove!",
      update: "{at: [invert('x', x()), invert('y', y())], down: event.type === 'pointerdown'}"}]}],
    data: [{name: "curves"}, {name: "points"}],
    scales: [{name: "x", domain: [-5, 5], range: "width", zero: false}, {name: "y", domain: [low, high], range: "height"}],
    axes: [{scale: "x", orient: "bottom", title: "x", tickCount: 5}, {scale: "y", orient: "left", title: "y", tickCount: 5}],
    marks: [{type: "group", name: "surface", clip: true,
      encode: {update: {width: {signal: "width"}, height: {signal: "height"}, fill: {value: "transparent"}}},
      marks: [
        {type: "group", from: {facet: {name: "curve", data: "curves", groupby: "name"}}, aria: false, interactive: false,
          marks: [{type: "line", from: {data: "curve"}, aria: false, interactive: false, encode: {update: {...at,
            stroke: {field: "colour"}, strokeWidth: {field: "wide"}, strokeDash: {field: "dash"}}}}]},
        {type: "symbol", from: {data: "points"}, aria: false, interactive: false, encode: {update: {...at,
          fill: {field: "fill"}, stroke: {value: "currentColor"}, strokeWidth: {value: 2}, size: {value: 80}}}}]}]};
}

async function sinusoid() {
  const {sizes, settings, test_loss} = data.sinusoid, UNTRAINED = "untrained", MOST = 50, names = Object.keys(data.sinusoid.parameters);
  const starts = Object.fromEntries(names.map(name => [name, Float64Array.from(unpack(data.sinusoid.parameters[name]))]));
  looks[UNTRAINED] = {...looks.exact, name: UNTRAINED, label: "not meta-trained", dash: [2, 3]};
  const along = range(-5, 0.1, 101), places = range(0, 1, 20).map(i => -5 + 10 * ((0.31 + i * 0.618034) % 1));
  const sine = x => amplitude.value * Math.sin(x - phase.value), curve = f => along.map(x => [x, f(x)]);
  const looked = [...range(0, 1, 6), 7, 10, 13, 16, ...range(20, 5, 7)];  // steps at which the distance is drawn
  let points, paths, distances, wanted, slid, fits, falls;
  /** The points of the curve chosen, which starts all adaptations anew. */
  function scatter() {
    points = places.slice(0, count.value).map(x => [x, sine(x)]);
    begin();
  }
  function begin() {
    paths = Object.fromEntries(names.map(name => [name, [starts[name]]]));
    distances = Object.fromEntries(names.map(name => [name, []]));
  }
  /** A network's parameters after k steps; those before are kept. */
  function adapted(name, k) {
    const path = paths[name];
    while (path.length <= k) path.push(descent_step(path.at(-1), sizes, points, lr.value));
    return path[k];
  }
  const away = (name, k, goal) => distances[name][k] ??= mean_squared(adapted(name, k), sizes, goal);
  /** The point that the sliders move: where they have come to, or, where it has moved otherwise, they to it. */
  function hold() {
    which.set(Math.min(which.value, points.length));
    const held = which.value - 1, moved = [across, up].map(control => control.value);
    if (held === slid?.held && moved.join() !== slid.at.join()) {
      points[held] = points[held].map((z, k) => moved[k] === slid.at[k] ? z : moved[k]);
      begin();
    } else points[held].forEach((z, k) => [across, up][k].set(z));
    slid = {held, at: [across, up].map(control => control.value)};
  }
  const here = panel("sinusoid", async () => {
    const setting = [amplitude, phase, count, lr].map(control => control.value).join();
    if (setting !== wanted) {
      scatter();
      slid = null;
    }
    wanted = setting;
    hold();
    const goal = curve(sine), xy = ([x, y], more) => ({x, y, ...more});
    fits.data("curves", [
      ...goal.map(point => xy(point, {name: "sine", colour: "currentColor", wide: 1.5, dash: [6, 4]})),
      ...shown.names.flatMap(name => curve(x => network(adapted(name, inner.value), sizes, x).value).map(point => (
        xy(point, {...looks[name], wide: 2}))))]);
    fits.data("points", points.map((point, i) => xy(point, {fill: i === slid.held ? "currentColor" : "var(--paper)"})));
    falls.data("curves", shown.names.flatMap(name => looked.map(k => (
      {x: k, y: away(name, k, goal), method: name}))).filter(({y}) => Number.isFinite(y)));
    falls.data("now", [{x: inner.value}]);
    await Promise.all([fits.runAsync(), falls.runAsync()]);
    here.section.dataset.points = JSON.stringify(points);
    here.section.querySelector("caption").textContent = `Mean squared distance after ${inner.value} steps`;
    tabulate(here.section, names.map(name => ({id: name, label: marked(looks[name]), off: !shown.has(name),
      cells: [mean_squared(adapted(name, inner.value), sizes, points), away(name, inner.value, goal)].map(x => [[x], precise(x)])})));
  });
  const inner = slider(here, "steps", "K, steps of adaptation", range(0, 1, MOST + 1), 5);
  const lr = slider(here, "lr", "η, their length", [0.002, 0.005, 0.01, 0.02], settings.inner_lr);
  const amplitude = slider(here, "amplitude", "a, amplitude", range(0.1, 0.1, 50), 3);
  const phase = slider(here, "phase", "b, phase", range(0, 0.05, 64), 1, two);
  const count = slider(here, "count", "points", range(1, 1, 20), 10);
  const which = slider(here, "which", "the filled point", count.values, 1, k => `${k} of ${count.value}`);
  const across = slider(here, "x", "its x", range(-5, 0.1, 101), 0, one), up = slider(here, "y", "its y", range(-6, 0.1, 121), 0, one);
  const again = element("button", {type: "button", id: "sinusoid-again"}, "Points back to the curve");
  again.addEventListener("click", () => { scatter(); slid = null; here.redraw(); });
  here.form.append(again);
  const shown = switches(here, names);
  const tested = (name, k) => `${looks[name].label} ${two(test_loss[name][k])}`;
  document.getElementById("sinusoid-tested").textContent = `Trained for ${settings.inner_steps} steps of length ` +
    `${settings.inner_lr} or, Reptile, twice as many of twice that. On ${settings["eval.tasks"]} new sinusoids with ` +
    `${settings["dataset.shots"]} points each, the loss after 5 steps ` +
    `is: ${names.map(name => tested(name, 5)).join(", ")}; after 50: ${names.map(name => tested(name, 50)).join(", ")}.`;
  fits = await embed(here.plots[0], regression(-6, 6), square);
  here.plots[0].classList.add("draggable");
  fits.addSignalListener("picked", (_, {at, down}) => {
    const [x, y] = at.map((z, k) => Math.max([-5, -6][k], Math.min([5, 6][k], z)));
    if (down) which.set(1 + points.reduce((best, [u, v], i) => (u - x) ** 2 + (v - y) ** 2 < (points[best][0] - x) ** 2 +
      (points[best][1] - y) ** 2 ? i : best, 0));
    points[which.value - 1] = [x, y];
    slid = null;
    begin();
    here.redraw();
  });
  const axis = (field, title, scale, more) => ({field, type: "quantitative", title, scale, axis: more});
  const steps = axis("x", "steps of adaptation", {domain: [0, MOST], nice: false}, {tickCount: 6, grid: false});
  falls = await embed(here.plots[1], {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: 400, height: 220, autosize: FIT, layer: [
      {data: {name: "curves", values: []}, mark: {type: "line", aria: false, clip: true, strokeWidth: 2}, encoding: {x: steps,
        y: axis("y", "squared distance", {type: "log", domain: [1e-3, 30], nice: false}, POWERS),
        ...Object.fromEntries([["stroke", "colour"], ["strokeDash", "dash"]].map(([channel, of]) => [channel, {field: "method",
          legend: null, scale: {domain: names, range: names.map(name => looks[name][of])}}]))}},
      {data: {name: "now", values: []}, mark: {type: "rule", aria: false, stroke: "currentColor", strokeDash: [2, 3]},
        encoding: {x: steps}}]}, wide);
  await here.redraw();
}

async function measured() {
  const charts = data.measured, views = [];
  const here = panel("measured", async () => {
    for (const [place, choice] of [[0, progress], [2, across]]) {
      if (drawn[place] === choice.value) continue;
      drawn[place] = choice.value;
      views[place]?.finalize();
      here.plots[place].replaceChildren();
      views[place] = await embed(here.plots[place], chart(choice.value), wide);
    }
    await Promise.all(views.map(view => view.signal("shown", shown.names).runAsync()));
  });
  const ACCURACY = ["validation accuracy (%)", "error"], WORK = "million example-gradients";
  const AXES = {accuracy: ["meta-step", "linear", ...ACCURACY], work: [WORK, "log", ...ACCURACY], race: [WORK, "log", ...ACCURACY],
    width: ["channels", "log", "memory, one task (MB)", "log"], steps: ["inner steps K", "log", "memory, one task (MB)", "log"],
    depth: ["convolutions", "linear", "memory, one task (MB)", "log"],
    bias: ["inner precision δ", "log", "bias, ‖g − ∇F‖ / ‖∇F‖", "log"]};
  const present = methods.map(m => m.name).filter(name => Object.values(charts).some(rows => rows.some(r => r.method === name)));
  const drawn = [];
  const [progress, across] = [["accuracy", "Accuracy", ["work", "accuracy"]], ["memory", "Memory", ["steps", "width", "depth"]]].map(
    ([name, label, keys]) => {
      const made = element("select", {id: `measured-${name}`}, ...keys.map(key =>
        element("option", {value: key}, `by ${key === "work" ? key : AXES[key][0]}`)));
      made.addEventListener("change", here.redraw);
      here.form.append(element("label", {for: made.id}, `${label}: `, made));
      return made;
    });
  const shown = switches(here, present);
  const HEADS = {accuracy: "Accuracy, tuned for the highest", work: "Accuracy, tuned for the highest",
    race: "Accuracy, tuned for the least work", bias: "Bias at the best ν", memory: "Memory of one task's meta-gradient"};

  /** An accuracy stands where the logarithm of its error is: 90 % is as far from 80 as 95 is from 90. */
  function chart(key) {
    const [xTitle, xScale, yTitle, yScale] = AXES[key], errors = yScale === "error", title = HEADS[key] ?? HEADS.memory;
    const shownAs = present.map(name => looks[name]), coloured = scale => ({field: "label", title: "method", legend: null,
      scale: {domain: shownAs.map(look => look.label), range: shownAs.map(look => look[scale])}});
    const plain = scale => scale === "linear" ? {tickCount: 6, format: "d"} : key === "bias" ? POWERS
      : {values: [-2, -1, 0, 1, 2, 3].flatMap(power => [1, 2, 5].map(x => x * 10 ** power)), format: "~g", labelSeparation: 4};
    const x = {field: "x", type: "quantitative", title: xTitle, scale: {type: xScale, nice: false}, axis: {...plain(xScale), grid: false}};
    const y = errors ? {field: "error", type: "quantitative", title: yTitle,
      scale: {type: "log", reverse: true, domain: [3, 85], nice: false, clamp: true},
      axis: {values: [3, 5, 10, 20, 40, 80], labelExpr: "format(100 - datum.value, 'd')"}}
      : {field: "y", type: "quantitative", title: yTitle, scale: {type: yScale}, axis: plain(yScale)};
    const tooltip = [{field: "label", title: "method"}, {field: "x", title: xTitle, format: ".4~g"}, {field: "y", title: yTitle, format: ".4~g"}];
    const band = key === "accuracy" || key === "work";
    if (band) tooltip.push({field: "low", format: ".3~g", title: "interval from"},
      {field: "high", format: ".3~g", title: "to"});
    if (errors) tooltip.push({field: "seeds", title: "seeds"});
    if (key === "bias") tooltip.push({field: "nu", format: "~g", title: "best ν"});
    const rows = charts[key].map(row => ({...row, label: looks[row.method].label,
      ...(errors && {error: 100 - row.y, said: `${xTitle}: ${precise(row.x)}; ${yTitle}: ${one(row.y)}; method: ${looks[row.method].label}`}), ...(band && {most: 100 - row.low, least: 100 - row.high})}));
    return {$schema: "https://vega.github.io/schema/vega-lite/v6.json", width: 300, height: 260, autosize: FIT, title, data: {values: rows},
      params: [{name: "shown", value: present}], transform: [{filter: "indexof(shown, datum.method) >= 0"}],
      encoding: {x}, layer: [
        ...(band ? [{mark: {type: "area", aria: false, opacity: 0.15, clip: true},
          encoding: {y: {...y, field: "most"}, y2: {field: "least"}, fill: coloured("fill")}}] : []),
        {mark: {type: "line", aria: false, strokeWidth: 1.5, clip: true}, encoding: {y, stroke: coloured("colour"),
          strokeDash: coloured("dash")}},
        {mark: {type: "point", size: errors ? 30 : 60, opacity: 1},
          encoding: {y, fill: coloured("fill"), stroke: coloured("colour"), shape: coloured("symbol"), tooltip,
            ...(errors && {description: {field: "said"}})}}]};
  }
  views[1] = await embed(here.plots[1], chart("race"), wide);
  views[3] = await embed(here.plots[3], chart("bias"), wide);
  await here.redraw();
}

await Promise.all([curvature(), compare(), tradeoff(), sinusoid(), measured()]);
document.documentElement.dataset.ready = "true";
