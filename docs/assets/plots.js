/* The plots of the results page: a forest plot and score against cost. The data are in the page
   (tools/site_plots.py). No library: two SVGs that are drawn anew when the choice or width changes. */
(function () {
  "use strict";
  const NS = "http://www.w3.org/2000/svg";
  const GROUPS = {
    hydra: ["HYDRA", "#d55e00"],
    prompt: ["prompts", "#0072b2"],
    sampling: ["choosing without learning", "#009e73"],
    adapter: ["adapter of others", "#b8860b"],
    control: ["baselines and controls", "#8a8a8a"],
    bound: ["bounds", "#a366a3"],
  };

  function make(name, attributes, parent, text) {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.appendChild(node);
    return node;
  }

  function html(name, attributes, parent, text) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.appendChild(node);
    return node;
  }

  /* A text's box as the browser draws it, in the font that is there. */
  function boxOf(text) {
    const { x, y, width, height } = text.getBBox();
    return { left: x, right: x + width, top: y, bottom: y + height };
  }

  const meet = (a, b) => a.left < b.right && a.right > b.left && a.top < b.bottom && a.bottom > b.top;

  /* Move a text to the side, if need be, so that it is inside. */
  function inside(text, width) {
    const { left, right } = boxOf(text);
    const by = left < 0 ? -left : Math.min(0, width - right);
    if (by) text.setAttribute("x", Number(text.getAttribute("x")) + by);
    return text;
  }

  /* The widest of some texts. */
  function widest(svg, texts, attributes) {
    const probe = make("text", attributes, svg);
    const lengths = texts.map((text) => { probe.textContent = text; return probe.getComputedTextLength(); });
    probe.remove();
    return Math.max(0, ...lengths);
  }

  const named = (row) => row.method.replace(" (chosen on training users)", "");
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(1);
  const figures = ([value, low, high]) =>
    low === undefined ? signed(value) : `${signed(value)} [${signed(low)}, ${signed(high)}]`;
  const score = ([value, low, high]) =>
    value.toFixed(3) + (low === undefined ? "" : ` [${low.toFixed(3)}, ${high.toFixed(3)}]`);

  /* Round marks of an axis: about `count` of them within the ends. */
  function marks(low, high, count) {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= 0.7 * raw);
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) {
      found.push(Math.round(at * 1e6) / 1e6);
    }
    return found;
  }

  function axis(svg, values, x, top, bottom, title, width) {
    let last = -Infinity;
    for (const value of values) {
      make("line", { x1: x(value), x2: x(value), y1: top, y2: bottom, class: value ? "grid" : "zero" }, svg);
      const at = { x: x(value), y: bottom + 18, "text-anchor": "middle" };
      const mark = inside(make("text", at, svg, String(value).replace("-", "−")), width);
      const { left, right } = boxOf(mark);
      if (left < last + 4) mark.remove();
      else last = right;
    }
    inside(make("text", { x: width / 2, y: bottom + 40, "text-anchor": "middle", class: "title" }, svg, title), width);
  }

  function drawing(parent, width, height, label) {
    parent.replaceChildren();
    const box = { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label };
    return make("svg", box, parent);
  }

  function forest(parent, chosen, width) {
    const rows = chosen.rows.filter((row) => row.share).sort((a, b) => b.share[0] - a.share[0]);
    const narrow = width < 620;
    const step = narrow ? 38 : 24;
    const bottom = rows.length * step + 8;
    const ends = rows.flatMap((row) => row.share);
    const low = Math.min(0, ...ends), high = Math.max(0, ...ends);
    const svg = drawing(parent, width, bottom + 48, `${chosen.finding}. ${rows.length} methods.`);
    const bold = { class: "strong number" };
    const left = narrow ? 8 : widest(svg, rows.map(named), bold) + 20;
    const right = narrow ? 8 : widest(svg, rows.map((row) => figures(row.share)), bold) + 20;
    const x = (value) => left + ((value - low) / (high - low)) * (width - left - right);
    axis(svg, marks(low, high, narrow ? 4 : 7), x, 0, bottom, "improvement over the best prompt, %", width);
    rows.forEach((row, place) => {
      const y = place * step + (narrow ? 26 : 16);
      const [value, from, to] = row.share;
      const colour = GROUPS[row.group][1];
      const own = make("g", { class: "row", style: `color:${colour}` }, svg);
      make("title", {}, own, `${row.method}: ${figures(row.share)} %`);
      make("rect", { x: 0, y: place * step, width, height: step, class: "hit" }, own);
      const name = narrow ? { x: 8, y: y - 10 } : { x: left - 12, y: y + 4, "text-anchor": "end" };
      const weight = row.group === "hydra" ? "strong" : "";
      make("text", { ...name, class: weight }, own, named(row));
      const at = { x: width - 4, y: narrow ? y - 10 : y + 4, "text-anchor": "end", class: `number ${weight}` };
      make("text", at, own, figures(row.share));
      if (from !== undefined) make("line", { x1: x(from), x2: x(to), y1: y, y2: y, class: "bar" }, own);
      const separated = from > 0 || to < 0;
      make("circle", { cx: x(value), cy: y, r: 5, class: separated ? "full" : "hollow" }, own);
    });
  }

  /* Put a label where it meets no other and no point, or remove it. */
  function settle(text, point, taken, start, width, height) {
    const box = boxOf(text);
    const long = box.right - box.left, tall = box.bottom - box.top, low = box.bottom;
    const middle = -long / 2, side = -tall / 2;
    const places = [[10, side], [-10 - long, side], [middle, -9 - tall], [middle, 9], [9, -4 - tall], [9, 4],
      [-9 - long, -4 - tall], [-9 - long, 4]];
    for (const [dx, dy] of places) {
      const own = { left: point.x + dx, right: point.x + dx + long, top: point.y + dy, bottom: point.y + dy + tall };
      const within = own.left >= start && own.right <= width && own.top >= 0 && own.bottom <= height;
      if (within && !taken.some((other) => meet(own, other))) {
        text.setAttribute("x", own.left);
        text.setAttribute("y", own.bottom - low);
        return taken.push(own);
      }
    }
    return text.remove();
  }

  function cost(parent, chosen, measure, width) {
    const rows = chosen.rows.filter((row) => row.score && row.score.length && row[measure] !== undefined);
    const height = 380, left = 56, right = 24, top = 12, bottom = 326;
    const values = rows.map((row) => row.score[0]), costs = rows.map((row) => row[measure]);
    const low = Math.min(...values), high = Math.max(...values), pad = (high - low) * 0.08 || 0.01;
    const most = Math.max(...costs) * 1.12 || 1;
    const x = (value) => left + (value / most) * (width - left - right);
    const y = (value) => bottom - ((value - low + pad) / (high - low + 2 * pad)) * (bottom - top);
    const svg = drawing(parent, width, height, `${chosen.metric} against ${measure} a query, ${rows.length} methods`);
    axis(svg, marks(0, most, width < 620 ? 4 : 8), x, top, bottom, `LLM ${measure} a query`, width);
    for (const value of marks(low, high, 5)) {
      make("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid" }, svg);
      make("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, svg, String(value));
    }
    const points = rows.map((row) => ({ row, x: x(row[measure]), y: y(row.score[0]) }));
    const taken = points.map((point) => ({ left: point.x - 8, right: point.x + 8, top: point.y - 8, bottom: point.y + 8 }));
    const order = ["hydra", "prompt", "sampling", "adapter", "bound", "control"];
    points.sort((a, b) => order.indexOf(a.row.group) - order.indexOf(b.row.group));
    for (const point of points) {
      const { row } = point;
      const own = make("g", { class: "row", style: `color:${GROUPS[row.group][1]}` }, svg);
      make("title", {}, own, `${row.method}: ${score(row.score)}, ${row.calls} calls, ${row.tokens} tokens a query`);
      make("circle", { cx: point.x, cy: point.y, r: 6, class: "full" }, own);
      const label = make("text", { x: 0, y: 0, class: row.group === "hydra" ? "strong" : "" }, own, named(row));
      settle(label, point, taken, left, width, bottom);
    }
  }

  function legend(parent, rows) {
    parent.replaceChildren();
    for (const [group, [name, colour]] of Object.entries(GROUPS)) {
      if (!rows.some((row) => row.group === group)) continue;
      const item = html("span", {}, parent);
      html("i", { style: `background:${colour}` }, item);
      item.append(name);
    }
  }

  function start(figure) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const bar = html("div", { class: "choices" }, figure);
    const choice = html("label", {}, bar, "Data ");
    const select = html("select", {}, choice);
    data.forEach((own, place) => html("option", { value: place }, select, own.name));
    const finding = html("p", { class: "finding", "aria-live": "polite" }, figure);
    const note = html("p", { class: "note" }, figure);
    const first = html("div", {}, figure);
    const key = html("p", { class: "legend" }, figure);
    const second = html("div", { class: "cost" }, figure);
    const heading = html("p", { class: "finding" }, second);
    const label = html("label", {}, second, "Cost ");
    const measure = html("select", {}, label);
    for (const name of ["calls", "tokens"]) html("option", { value: name }, measure, `${name} a query`);
    const plot = html("div", {}, second);

    function draw() {
      const chosen = data[Number(select.value)];
      const width = Math.max(280, figure.clientWidth);
      finding.textContent = chosen.finding;
      note.textContent = `${chosen.note}. Bars: 95 % intervals over users; filled: the interval excludes 0.`;
      forest(first, chosen, width);
      legend(key, chosen.rows);
      second.hidden = !chosen.metric;
      if (chosen.metric) {
        heading.textContent = `${chosen.metric} against what it costs`;
        cost(plot, chosen, measure.value, width);
      }
    }
    select.addEventListener("change", draw);
    measure.addEventListener("change", draw);
    let width = 0;
    new ResizeObserver(() => {
      if (figure.clientWidth !== width) { width = figure.clientWidth; draw(); }
    }).observe(figure);
    draw();
    document.fonts.ready.then(draw);  // a font that comes later has other widths
  }

  document.querySelectorAll("figure.plots").forEach(start);
})();
