// Fills the page from its data: the heat map's switch, the pages of the sites, pictures, sorting and filtering.
// Texts of the data are only ever set as text: tokens and names come from files of others.
"use strict";
(async () => {
  const byId = (id) => document.getElementById(id);
  const specifications = JSON.parse(byId("specifications").textContent);
  let data;
  try {
    const bytes = Uint8Array.from(atob(byId("data").textContent), (letter) => letter.charCodeAt(0));
    const opened = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    data = await new Response(opened).json();
  } catch (error) {
    byId("failed").textContent = `The pictures cannot be shown: this browser did not unpack the data (${error}).`;
    byId("failed").hidden = false;
    return;
  }
  const pages = new Map(data.pages.map((page) => [`${page.layer}/${page.site}`, page]));
  const marksOf = ({ marks }) =>
    marks.label.map((_, i) => Object.fromEntries(Object.entries(marks).map(([name, column]) => [name, column[i]])));

  // Numbers for people, as the page's own tables have them.
  const number = (value) => {
    if (value === null) return "–";
    const size = Math.abs(value);
    if (size >= 999.5 && size < 1e15) return Math.round(value).toLocaleString("en");
    if (size !== 0 && (size < 1e-4 || size >= 1e15)) return value.toExponential(2);
    return String(Number(value.toPrecision(3)));
  };
  const share = (value) =>
    value === null
      ? "–"
      : 0 < Math.abs(value) && Math.abs(value) < 0.001
        ? `${number(1e6 * value)} ppm`
        : `${number(100 * value)} %`;
  const thousandths = (value) => number(value === null ? null : 1000 * value);
  const layerName = (layer) => (layer === -1 ? "head" : `layer ${layer}`);
  const titleOf = (page) => `${page.layer === -1 ? "Head" : `Layer ${page.layer}`}: ${page.site}`;
  const address = (layer, site, group) =>
    `#layer-${layer}/${[site, ...(group ? [group] : [])].map(encodeURIComponent).join("/").replaceAll("%3A", ":")}`;
  const siteOf = (hash) => {
    const found = /^#layer-(-?\d+)\/(.+)$/.exec(hash);
    if (!found) return null;
    const parts = found[2].split("/").map(decodeURIComponent);
    const page = pages.get(`${found[1]}/${parts[0]}`);
    return page ? { page, group: parts[1] } : null;
  };

  const element = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    if (text instanceof Node) made.append(text);
    else if (text !== null && text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };

  // Tables. A cell is {text, value, node}; a column {name, numeric}.
  const fill = (table, columns, rows) => {
    table.tHead.replaceChildren(element("tr"));
    for (const column of columns)
      table.tHead.rows[0].append(element("th", column.name, { scope: "col", class: column.numeric ? "n" : "" }));
    const made = rows.map((cells) => {
      const row = document.createElement("tr");
      cells.forEach((cell, place) => {
        const td = element(place === 0 ? "th" : "td", null, columns[place].numeric ? { class: "n" } : {});
        if (place === 0) td.setAttribute("scope", "row");
        if (cell.node) td.append(cell.node);
        else td.append(element("bdi", cell.text));
        if (cell.class) td.classList.add(cell.class);
        if (cell.value !== undefined) td.dataset.v = cell.value === null ? "" : cell.value;
        row.append(td);
      });
      return row;
    });
    table.tBodies[0].replaceChildren(...made);
    sortable(table);
  };
  const key = (row, place) => {
    const cell = row.cells[place];
    if (!("v" in cell.dataset)) {
      const leading = parseFloat(cell.textContent.replaceAll(",", ""));
      if (/^[-–]?$/.test(cell.textContent.trim())) return NaN;
      return Number.isNaN(leading) ? cell.textContent.trim() : leading;
    }
    return cell.dataset.v === "" || cell.dataset.v === "None" ? NaN : Number(cell.dataset.v);
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") {
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b) || 0;
      return a - b;
    }
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a.localeCompare(b, "en", { numeric: true });
  };
  // A field over the table that leaves the rows with all of its words; the table of scales has its own.
  const filters = new Map();
  const filterable = (table) => {
    const known = filters.get(table);
    if (known) known.value = "";
    if (known || table.id === "scale-table") return;
    const place = table.closest(".wide"),
      input = element("input", null, { type: "search", autocomplete: "off", spellcheck: "false" }),
      label = element("label", "Filter "),
      form = element("form", null, { class: "filter" }),
      named = place.getAttribute("aria-label") ?? byId(place.getAttribute("aria-labelledby")).textContent;
    input.setAttribute("aria-label", `Filter: ${named}`);
    label.append(input);
    form.append(label);
    form.addEventListener("submit", (event) => event.preventDefault());
    input.addEventListener("input", () => {
      const words = input.value.trim().toLowerCase().split(/\s+/);
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
    place.before(form);
    filters.set(table, input);
  };
  const sortable = (table) => {
    filterable(table);
    [...table.tHead.rows[0].cells].forEach((cell, place) => {
      const button = element("button", null, { type: "button" });
      button.append(...cell.childNodes);
      cell.append(button);
      button.addEventListener("click", () => {
        const down = cell.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows].map((row) => [key(row, place), row]);
        const absent = (value) => typeof value === "number" && Number.isNaN(value);
        rows.sort(([a], [b]) => (absent(a) || absent(b) || !down ? compare(a, b) : compare(b, a)));
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  };

  // Pictures. Colours that must follow the page are currentColor: light, dark and print need no second drawing.
  const config = {
    background: null,
    view: { stroke: null },
    font: "system-ui, sans-serif",
    axis: {
      labelColor: "currentColor",
      titleColor: "currentColor",
      tickColor: "currentColor",
      domainColor: "currentColor",
      gridColor: "currentColor",
      gridOpacity: 0.12,
      labelFontSize: 12,
      titleFontSize: 12,
      titleFontWeight: "normal",
    },
  };
  const drawn = new Map();
  const draw = async (figure, datasets, change = (specification) => specification) => {
    const place = figure.querySelector(".drawn");
    const specification = change({ ...structuredClone(specifications[figure.dataset.picture]), datasets });
    drawn.get(place)?.finalize();
    drawn.delete(place);
    // A layer without rows has no extent, of which Vega would warn.
    if (specification.layer)
      specification.layer = specification.layer.filter(({ data: of }) => !of || datasets[of.name].length > 0);
    figure.hidden = Object.values(datasets).every((rows) => rows.length === 0);
    if (figure.hidden) return null;
    const made = await vegaEmbed(place, specification, {
      renderer: "svg",
      ast: true,
      config,
      downloadFileName: `quambase-${figure.dataset.picture}`,
      actions: { export: true, source: false, compiled: false, editor: false },
      tooltip: { disableDefaultStyle: false },
    });
    drawn.set(place, made);
    const menu = place.querySelector("details > summary");
    if (menu) {
      menu.setAttribute("aria-label", "Save this picture");
      place.removeAttribute("aria-hidden");
      place.querySelector("svg.marks")?.setAttribute("aria-hidden", "true");
    }
    return made.view;
  };

  // The axis has a tick at the end of each bucket of tokens.
  const ticksAt = (ends) => (specification) => {
    for (const { encoding } of specification.layer) if (encoding.x?.axis) encoding.x.axis.values = ends;
    return specification;
  };
  const REACHES = { amax: "largest", q9999: "99.99 %", q999: "99.9 %", q99: "99 %", q50: "median" };
  const drawPositions = (figure, found) =>
    draw(
      figure,
      {
        reaches: Object.entries(REACHES).flatMap(([key, quantile]) =>
          found.to.map((to, i) => ({ to, quantile, value: found[key][i] })).filter((row) => row.value > 0),
        ),
        clips: found.clips
          .map(([label, value], place) => ({ label: `${label} clips`, value, place }))
          .filter((row) => row.value > 0),
      },
      ticksAt(found.to),
    );

  const LINE = 21; // pixels of a strategy's line
  const high = (lines) => (specification) => ({ ...specification, height: LINE * lines });

  // The heat map.
  const SHADES = { outlier_ratio: 1, predicted_kl: 1, clipped_share: 1, sqnr_db: -1 }; // -1: less is worse
  const numbersOf = (measure, label) =>
    measure === "outlier_ratio" ? data.ratios : data.grids[data.labels.indexOf(label)][measure];
  const formats = { outlier_ratio: number, predicted_kl: thousandths, clipped_share: share, sqnr_db: number };
  const DECADES = 3; // what is a thousand times smaller than the worst is as pale as nothing
  const shadesOf = (measure, values) => {
    const known = values.filter((value) => value !== null && (measure === "sqnr_db" || value > 0));
    const scaled = measure === "sqnr_db" ? (value) => value : (value) => Math.log10(value);
    let low = Math.min(...known.map(scaled)),
      high = Math.max(...known.map(scaled));
    if (measure !== "sqnr_db") low = Math.max(low, high - DECADES);
    return values.map((value) => {
      if (value === null || (measure !== "sqnr_db" && value <= 0)) return 0;
      const part = high > low ? Math.min(1, Math.max(0, (scaled(value) - low) / (high - low))) : 0.5;
      return SHADES[measure] > 0 ? part : 1 - part;
    });
  };
  const heat = byId("heat");
  const showHeat = () => {
    const measure = document.querySelector("#switch input:checked")?.value;
    if (!measure) return;
    const label = byId("of-strategy").value;
    const values = numbersOf(measure, label),
      shades = shadesOf(measure, values),
      format = formats[measure];
    const about = data.measures.find((one) => one.key === measure);
    byId("of-strategy").disabled = measure === "outlier_ratio";
    const whose = measure === "outlier_ratio" ? "" : ` of ${label}`;
    byId("measure-meaning").textContent =
      `${about.name[0].toUpperCase()}${about.name.slice(1)}${whose}: ${about.meaning}. ` +
      "Each number leads to the page of its site.";
    data.layers.forEach((layer, row) =>
      data.sites.forEach((site, column) => {
        const cell = heat.tBodies[0].rows[row].cells[column + 1],
          link = cell.querySelector("a");
        if (!link) return;
        const value = values[row * data.sites.length + column];
        link.textContent = format(value);
        link.setAttribute("aria-label", `${layerName(layer)} ${site}: ${about.name} ${format(value)}`);
        cell.style.setProperty("--shade", shades[row * data.sites.length + column].toFixed(3));
      }),
    );
    data.sites.forEach((_, column) => {
      // a site of which nothing is known has no column
      const none = data.layers.every((_, row) => values[row * data.sites.length + column] === null);
      for (const row of heat.rows) row.cells[column + 1].hidden = none;
    });
    const known = values.filter((value) => value !== null);
    const ends = [Math.min(...known), Math.max(...known)].map(format);
    if (SHADES[measure] < 0) ends.reverse();
    byId("shades-words").textContent = known.length
      ? `${ends[0]} to ${ends[1]}: more blue is worse`
      : `No site has ${about.name}${whose}.`;
    byId("shades").hidden = false;
    for (const tap of document.querySelectorAll("#answer .block a")) {
      const column = data.sites.indexOf(tap.dataset.site);
      const of = data.layers
        .map((_, row) => row)
        .filter((row) => heat.tBodies[0].rows[row].cells[column + 1].firstChild);
      const worst = of.reduce((a, b) =>
        shades[b * data.sites.length + column] > shades[a * data.sites.length + column] ? b : a,
      );
      tap.setAttribute("href", address(data.layers[worst], tap.dataset.site));
      tap.querySelector("title").textContent = `${tap.dataset.site}, ${layerName(data.layers[worst])}`;
      tap.style.setProperty("--shade", shades[worst * data.sites.length + column].toFixed(3));
    }
  };

  // The page of a site.
  let shown = null,
    chosen = null;
  const views = new Map();
  const figureIn = (id) => byId(id).querySelector(".picture");
  const choose = (label) => {
    chosen = label;
    for (const view of views.values()) view.signal("chosen", label ?? "").runAsync();
    for (const row of byId("site-marks").tBodies[0].rows) {
      const radio = row.querySelector("input");
      radio.checked = radio.value === label;
      row.classList.toggle("chosen", radio.checked);
    }
  };
  const clickable = (view) =>
    view?.addEventListener("click", (_, item) => {
      if (item?.datum?.label !== undefined) choose(item.datum.label);
    });
  const SHOWN = 1e5; // bins so much nearer to 0 than the largest are not drawn
  const binsOf = (group) => {
    const { first, bins, counts } = group.histogram;
    const edge = (step) => 2 ** ((first + step) / bins);
    let beyond = counts.reduce((a, b) => a + b, 0);
    return counts
      .map((count, step) => {
        const row = { low: edge(step), high: edge(step + 1), count, above: beyond / group.total };
        beyond -= count;
        return row;
      })
      .filter((row) => row.count > 0 && row.low >= group.amax / SHOWN);
  };
  const sentenceOf = (group) => {
    const marks = marksOf(group),
      best = marks.find((mark) => mark.selected);
    const clause =
      group.total === 0
        ? "No value was counted."
        : `${group.total.toLocaleString("en")} values; the largest |x| is ${number(group.amax)}, ` +
          `and 99.95 % lie within ` +
          `${number(group.q9995)}: a ratio of ${number(group.ratio)}.`;
    const bad = group.nonfinite ? ` ${group.nonfinite.toLocaleString("en")} more are NaN or infinite.` : "";
    if (!best) return clause + bad;
    const kl = best.predicted_kl === null ? "" : `, predicted KL x1000 ${thousandths(best.predicted_kl)}`;
    return (
      `${clause}${bad} Selected: ${best.label}, which clips at ${number(best.clips_at)} ` +
      `(${share(best.clipped_share)} of the values), SQNR ${number(best.sqnr_db)} dB${kl}.`
    );
  };
  const showMarks = (group) => {
    const marks = marksOf(group),
      table = byId("site-marks");
    const columns = [
      { name: "strategy" },
      { name: "clips at", numeric: true },
      { name: "scale", numeric: true },
      { name: "zero point", numeric: true },
      { name: "clipped", numeric: true },
      { name: "SQNR, dB", numeric: true },
      { name: "MSE", numeric: true },
      { name: "predicted KL x1000", numeric: true },
      { name: "remark" },
    ];
    fill(
      table,
      columns,
      marks.map((mark) => {
        const radio = element("input", null, { type: "radio", name: "mark", value: mark.label });
        radio.addEventListener("change", () => choose(mark.label));
        const label = element("label", radio);
        label.append(" ", element("bdi", mark.label));
        const remarks = [...(mark.selected ? ["selected"] : []), ...(mark.needs_decode ? ["needs a decoder"] : [])];
        return [
          { node: label },
          { text: number(mark.clips_at), value: mark.clips_at },
          { text: number(mark.scale), value: mark.scale },
          { text: String(mark.zero_point), value: mark.zero_point },
          { text: share(mark.clipped_share), value: mark.clipped_share },
          { text: number(mark.sqnr_db), value: mark.sqnr_db },
          { text: number(mark.mse), value: mark.mse },
          { text: thousandths(mark.predicted_kl), value: mark.predicted_kl },
          { text: remarks.join(", ") },
        ];
      }),
    );
    byId("site-strategies-title").textContent = marks.length
      ? "Strategies here"
      : "Strategies here: none, for want of a scale table (quambase analyze)";
  };
  const drawCurve = async (id, curve, errors, least, marks, errorOf, title) => {
    byId(id).hidden = !curve || !errors;
    views.delete(id);
    if (byId(id).hidden) return;
    const rows = curve.scale.map((scale, i) => ({ scale, error: errors[i] })).filter((row) => row.error > 0);
    const at = rows.filter((row) => row.scale === least);
    const points = marks
      .filter((mark) => !mark.needs_decode && errorOf(mark) > 0)
      .map((mark) => ({ ...mark, error: errorOf(mark) }));
    byId(`${id}-words`).textContent =
      `The least, at scale ${number(least)}, is marked by a diamond.` +
      (points.some((mark) => mark.zero_point !== 0)
        ? " A triangle has a zero point, so that it may lie under the curve."
        : "");
    const view = await draw(figureIn(id), { curve: rows, least: at, marks: points }, (specification) => {
      specification.layer[0].encoding.y.title = title;
      return specification;
    });
    clickable(view);
    if (view) views.set(id, view);
  };
  const showGroup = async (page, group) => {
    const marks = marksOf(group);
    const parts = page.groups.filter((one) => one.curve).length;
    byId("site-words").textContent =
      sentenceOf(group) +
      (group.curve || !parts
        ? ""
        : ` The INT8 model reads a scale for each of ${parts} groups: choose one for its errors.`);
    showMarks(group);
    const histogram = binsOf(group);
    const left = group.total - histogram.reduce((sum, row) => sum + row.count, 0);
    byId("distribution-words").textContent =
      left === 0
        ? ""
        : `Not drawn: ${left.toLocaleString("en")} values (${share(left / group.total)}) that are 0 or nearer to it.`;
    const drawing = draw(figureIn("site"), {
      histogram,
      marks: marks.filter((mark) => mark.clips_at > 0),
    });
    views.clear();
    const view = await drawing;
    clickable(view);
    if (view) views.set("distribution", view);
    const curve = group.curve;
    await drawCurve("curve-mse", curve, curve?.mse, curve?.least_mse, marks, (mark) => mark.mse, "mean squared error");
    await drawCurve(
      "curve-kl",
      curve,
      curve?.kl,
      curve?.least_kl,
      marks,
      (mark) => mark.predicted_kl,
      "predicted KL, nats a token",
    );
    choose((marks.find((mark) => mark.selected) ?? marks[0])?.label ?? null);
  };
  const showChannels = async (page) => {
    const { count, outliers, ranks, reach, named } = page.channels;
    byId("channels-words").textContent =
      `${outliers ? outliers.toLocaleString("en") : "None"} of ` +
      `${count.toLocaleString("en")} channels ${outliers > 1 ? "reach" : "reaches"} ` +
      "at least 5 times as far as the median.";
    fill(
      byId("site-channels"),
      [
        { name: "channel", numeric: true },
        { name: "group" },
        { name: "largest |x|", numeric: true },
        { name: "over the median", numeric: true },
        { name: "mean", numeric: true },
      ],
      named.map(([channel, group, amax, mean, ratio]) => [
        { text: String(channel), value: channel },
        { text: group },
        { text: number(amax), value: amax },
        { text: number(ratio), value: ratio },
        { text: number(mean), value: mean },
      ]),
    );
    const rows = ranks.map((rank, i) => ({ rank, reach: reach[i] })).filter((row) => row.reach > 0);
    const names = named
      .slice(0, Math.min(3, outliers))
      .map(([channel, , amax], i) => ({ rank: i + 1, reach: amax, name: String(channel) }))
      .filter((row) => row.reach > 0)
      .slice(0, 1);
    await draw(byId("channels-words").parentElement, {
      reach: rows,
      named: names.map((row) => ({ ...row, name: `channel ${row.name}` })),
    });
  };
  const visible = (text) =>
    text.replace(/[\p{Cc}\p{Cf}]/gu, (letter) =>
      letter === "\n" ? "⏎" : `\\u${letter.codePointAt(0).toString(16).padStart(4, "0")}`,
    );
  const inContext = (token, before, after) => {
    const whole = element("span", null, { class: "token" });
    whole.append(visible(before ?? ""), element("mark", token === null ? "–" : visible(token)), visible(after ?? ""));
    return whole;
  };
  const showTokens = (page) => {
    fill(
      byId("site-tokens"),
      [
        { name: "value", numeric: true },
        { name: "token, in its text" },
        { name: "document", numeric: true },
        { name: "position", numeric: true },
        { name: "channel", numeric: true },
        { name: "group" },
      ],
      page.tokens.map(([value, token, before, after, document_, position, channel, group]) => [
        { text: number(value), value },
        { node: element("bdi", inContext(token, before, after)) },
        { text: String(document_ ?? "–"), value: document_ },
        { text: String(position ?? "–"), value: position },
        { text: String(channel), value: channel },
        { text: group },
      ]),
    );
  };
  const neighbours = (page) => {
    const place = byId("site-neighbours");
    place.replaceChildren();
    const column = data.layers.filter((layer) => pages.has(`${layer}/${page.site}`));
    const at = column.indexOf(page.layer);
    for (const [step, word] of [
      [-1, "previous layer"],
      [1, "next layer"],
    ]) {
      const layer = column[at + step];
      if (layer === undefined) continue;
      if (place.firstChild) place.append(" · ");
      place.append(element("a", word, { href: address(layer, page.site) }));
    }
  };
  const showDrawing = (page) => {
    const place = byId("site-drawing"),
      original = document.querySelector("#answer .block");
    if (!place || !original) return;
    const copy = original.cloneNode(true);
    for (const tap of copy.querySelectorAll("a")) {
      const site = tap.dataset.site,
        layer = pages.has(`${page.layer}/${site}`)
          ? page.layer
          : data.layers.find((one) => pages.has(`${one}/${site}`));
      tap.setAttribute("href", address(layer, site));
      tap.querySelector("title").textContent = `${site}, ${layerName(layer)}`;
      tap.style.removeProperty("--shade");
      if (site === page.site) {
        tap.classList.add("here");
        tap.setAttribute("aria-current", "page");
      }
    }
    place.replaceChildren(copy);
  };
  const showPositions = async (found) => {
    const place = byId("site-by-position");
    if (place) place.hidden = !found;
    if (!found) return;
    byId("by-position-words").textContent = `${found.words}. A dashed line is where a scale clips.`;
    const reaches = Object.entries(REACHES);
    fill(
      byId("site-positions"),
      [{ name: "tokens" }, ...reaches.map(([, name]) => ({ name, numeric: true }))],
      found.tokens.map((tokens, i) => [
        { text: tokens, value: found.to[i] },
        ...reaches.map(([key]) => ({ text: number(found[key][i]), value: found[key][i] })),
      ]),
    );
    await drawPositions(figureIn("site-by-position"), found);
  };
  const quoted = (text) => (/^[\w:.,-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
  const showSite = async ({ page, group }) => {
    const found = page.groups.find((one) => one.name === group) ?? page.groups[0];
    byId("site-title").textContent = titleOf(page);
    byId("site-about").textContent = page.about;
    neighbours(page);
    showDrawing(page);
    const select = byId("site-group");
    select.replaceChildren(...page.groups.map((one) => element("option", one.name, { value: one.name })));
    select.value = found.name;
    byId("site-groups").hidden = page.groups.length < 2;
    select.onchange = () => {
      location.hash = address(page.layer, page.site, select.value);
    };
    const site = `'${page.site.replaceAll("'", "''")}'`;
    const query = `select * from outlier_channels where layer = ${page.layer} and site = ${site} order by amax desc`;
    byId("site-commands").textContent =
      `quambase compare --layer ${page.layer} --site ${quoted(page.site)}\n` + `quambase sql ${quoted(query)}`;
    showTokens(page);
    await showGroup(page, found);
    await showPositions(page.positions);
    await showChannels(page);
  };

  // Which part of the page is seen follows the address.
  const follow = async (move) => {
    const site = siteOf(location.hash);
    byId("overview").hidden = site !== null;
    byId("site").hidden = site === null;
    document.title = site ? `${titleOf(site.page)} · ${data.model}` : overviewTitle;
    if (site) {
      const same = shown === site.page;
      shown = site.page;
      if (!same && move) {
        window.scrollTo(0, 0);
        byId("site-title").focus({ preventScroll: true });
      }
      await showSite(site);
    } else {
      shown = null;
      await drawOverview();
      if (move && location.hash.length > 1) document.getElementById(location.hash.slice(1))?.scrollIntoView();
    }
    document.documentElement.dataset.ready = location.hash || "#";
  };
  const overviewTitle = document.title;
  let overviewDrawn = false;
  const drawOverview = async () => {
    if (overviewDrawn) return;
    overviewDrawn = true;
    for (const figure of document.querySelectorAll("#overview .picture")) {
      if (figure.dataset.picture === "strategies") {
        const sites = data.strategies.flatMap(([label, rows]) =>
          rows.filter(([, , sqnr]) => sqnr !== null).map(([layer, site, sqnr_db]) => ({ label, layer, site, sqnr_db })),
        );
        const view = await draw(figure, { sites }, high(data.strategies.length));
        view?.addEventListener("click", (_, item) => {
          if (item?.datum?.site !== undefined) location.hash = address(item.datum.layer, item.datum.site);
        });
      } else if (figure.dataset.picture === "evaluation") {
        const rows = data.evaluation[Number(figure.dataset.text)].rows.filter((row) => row.kl > 0);
        await draw(figure, { strategies: rows, intervals: rows.filter((row) => row.low > 0) }, high(rows.length));
      } else if (figure.dataset.picture === "decoding") {
        const { decoded, prefill } = data.decoding[Number(figure.dataset.text)];
        const above = (rows) => rows.filter((row) => row.kl > 0);
        const ends = [...new Set(decoded.map((row) => row.to))].sort((a, b) => a - b);
        const bands = decoded.filter((row) => row.low > 0);
        await draw(figure, { decoded: above(decoded), bands, prefill: above(prefill) }, ticksAt(ends));
      } else if (figure.dataset.picture === "positions") {
        await drawPositions(figure, pages.get(`${figure.dataset.layer}/${figure.dataset.site}`).positions);
      } else if (figure.dataset.picture === "convergence") {
        const sizes = data.convergence.filter((row) => row.change !== null);
        await draw(figure, { sizes }, (specification) => {
          specification.facet.sort = [...new Set(sizes.map((row) => row.strategy))];
          return specification;
        });
      }
    }
  };

  // The table of scales.
  const MOST = 500; // rows; a browser lays out thousands slowly
  const showScales = () => {
    const label = byId("scales-of").value,
      wanted = byId("scales-filter").value.trim().toLowerCase().split(/\s+/);
    const rows = [];
    for (const page of data.pages)
      for (const group of page.groups)
        for (const mark of marksOf(group)) {
          if (label === "selected" ? !mark.selected : label !== "every strategy" && mark.label !== label) continue;
          const words = [page.layer, page.site, group.name, mark.label].map(String);
          if (wanted.every((word) => words.some((text) => text.toLowerCase().includes(word))))
            rows.push([page, group, mark]);
        }
    byId("scales-words").textContent =
      label === "selected"
        ? "The selected scale of each scale group."
        : label === "every strategy"
          ? "Every strategy at each scale group."
          : `The scales of ${label}.`;
    const more = rows.length > MOST ? `, the first ${MOST} shown: filter for others` : "";
    byId("scales-count").textContent = `${rows.length.toLocaleString("en")} scales${more}`;
    fill(
      byId("scale-table"),
      [
        { name: "layer", numeric: true },
        { name: "site" },
        { name: "group" },
        { name: "strategy" },
        { name: "scale", numeric: true },
        { name: "zero point", numeric: true },
        { name: "clipped", numeric: true },
        { name: "SQNR, dB", numeric: true },
        { name: "predicted KL x1000", numeric: true },
      ],
      rows.slice(0, MOST).map(([page, group, mark]) => [
        { text: String(page.layer), value: page.layer },
        {
          node: element("a", element("bdi", page.site), {
            href: address(page.layer, page.site, group.name === "all" ? "" : group.name),
          }),
        },
        { text: group.name },
        { text: mark.label },
        { text: number(mark.scale), value: mark.scale },
        { text: String(mark.zero_point), value: mark.zero_point },
        { text: share(mark.clipped_share), value: mark.clipped_share },
        { text: number(mark.sqnr_db), value: mark.sqnr_db },
        { text: thousandths(mark.predicted_kl), value: mark.predicted_kl },
      ]),
    );
  };

  const options = (select, labels) =>
    select.replaceChildren(...labels.map((label) => element("option", label, { value: label })));
  options(byId("of-strategy"), data.labels);
  byId("of-strategy").parentElement.hidden = !data.labels.length;
  byId("switch").hidden = !data.measures.length;
  byId("switch").addEventListener("change", showHeat);
  showHeat();
  for (const table of document.querySelectorAll("#overview table.sortable"))
    if (table.id !== "scale-table") sortable(table);
  if (byId("scale-table")) {
    options(byId("scales-of"), [...data.labels, "every strategy"]);
    byId("choose-scales").hidden = false;
    byId("choose-scales").addEventListener("input", showScales);
    showScales();
  }
  const finder = byId("find-site");
  byId("find-sites").replaceChildren(
    ...data.pages.map((page) => element("option", null, { value: `${page.layer} ${page.site}` })),
  );
  byId("find").hidden = false;
  const find = () => {
    const page = pages.get(finder.value.trim().replace(/\s+/, "/"));
    if (page) {
      location.hash = address(page.layer, page.site);
      finder.value = "";
    }
  };
  finder.addEventListener("input", find);
  for (const form of document.forms)
    form.addEventListener("submit", (event) => {
      event.preventDefault();
    });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      event.preventDefault();
      finder.focus();
    }
  });
  window.addEventListener("hashchange", () => follow(true));
  await follow(location.hash.length > 1);
})();
