"use strict";
/* Views: each answers one question. `mount` makes its elements once; `draw` brings them up to date. */

/** An element with attributes (functions become listeners) and children; text is text, never markup. */
moeplan.make = function (name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
};
const make = moeplan.make;

moeplan.number = (value, digits = 0) => value.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits});
moeplan.percent = (value) => `${moeplan.number(100 * value, Math.abs(value) < 0.1 ? 1 : 0)} %`;
moeplan.time = function (seconds) {
  const size = Math.abs(seconds);
  if (size === 0) return "0 s";
  if (size >= 120) return `${moeplan.number(seconds / 60, 1)} min`;
  if (size >= 1) return `${moeplan.number(seconds, size < 10 ? 2 : 1)} s`;
  return size >= 1e-3 ? `${moeplan.number(seconds * 1e3, size < 0.01 ? 2 : 0)} ms` : `${moeplan.number(seconds * 1e6, 1)} µs`;
};
moeplan.bytes = (count) => (count >= 1e12 ? `${moeplan.number(count / 1e12, 2)} TB` : count >= 1e9 ? `${moeplan.number(count / 1e9, 1)} GB` : `${moeplan.number(count / 1e6, 1)} MB`);

moeplan.reasons = {
  initial: "the job began",
  held: "held from the first step to the last",
  gain: "the new layouts are better, and moving is free",
  gain_pays: "taken: what it saves pays for the move",
  no_gain: "stay: nothing better was found",
  gain_too_small: "stay: it would not pay for the move",
  solve_failed: "stay: planning failed",
  store_failed: "stay: the plan could not be stored",
  apply_failed: "back: a rank could not apply the plan",
  unknown: "not said",
};

/** Colours and lines; the three strategies differ in hue, lightness and dash. */
moeplan.look = function () {
  const css = getComputedStyle(document.documentElement);
  const of = (name) => css.getPropertyValue(`--${name}`).trim();
  return {
    ink: of("ink"), soft: of("soft"), line: of("line"), card: of("card"), shift: of("shift"), rest: [of("rest"), of("rest2")],
    heat: [0, 1, 2, 3, 4].map((i) => of(`heat${i}`)),
    strategy: (model, s) => (s === model.ours ? of("ours") : s === 0 ? of("static") : of("other")),
    dash: (model, s) => (s === model.ours ? "solid" : s === 0 ? "dotted" : "dashed"),
  };
};
/** Okabe and Ito's colours, which people who see few colours tell apart. */
moeplan.hot = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"];
moeplan.decals = ["circle", "rect", "triangle", "diamond"];

moeplan.axis = function (look, name, extra = {}) {
  return {
    name, nameLocation: "middle", nameGap: 30, nameTextStyle: {color: look.soft, fontSize: 13},
    axisLabel: {color: look.soft, fontSize: 12, hideOverlap: true}, axisLine: {lineStyle: {color: look.soft}},
    splitLine: {lineStyle: {color: look.line}}, ...extra,
  };
};
moeplan.above = (look, name, extra = {}) => moeplan.axis(look, name, {nameLocation: "end", nameGap: 12, nameTextStyle: {color: look.soft, fontSize: 13, align: "left", padding: [0, 0, 0, -34]}, ...extra});

moeplan.base = (look) => ({
  animation: false, textStyle: {fontFamily: "system-ui, sans-serif"},
  grid: {left: 12, right: 22, top: 34, bottom: 30, containLabel: true},
  tooltip: {confine: true, backgroundColor: look.card, borderColor: look.line, textStyle: {color: look.ink}},
  legend: {show: false},
});

/** What a pointer reads: a title and rows of name and value. */
moeplan.tip = (title, rows) => make("div", {class: "tip"}, make("b", {}, title),
  make("table", {}, rows.map(([name, value, colour]) => {
    const key = make("i");
    if (colour) { key.style.cssText = `display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:5px;background:${colour}`; }
    return make("tr", {}, make("td", {}, colour ? key : "", name), make("td", {}, value));
  })));

/** A chart that resizes with its element and is said in words by `label`. */
moeplan.chart = function (app, host) {
  host.setAttribute("role", "img");
  const chart = echarts.init(host, null, {renderer: "canvas"});
  app.charts.push(chart);
  new ResizeObserver(() => chart.resize()).observe(host);
  return chart;
};

moeplan.section = (id, title, finding, ...rest) => make("section", {id, "aria-labelledby": `${id}-title`},
  make("h2", {id: `${id}-title`}, title), finding, ...rest);

/** A section of a view that is one chart: its finding, its host and its keys are the view's. */
moeplan.charted = function (app, view, id, title) {
  view.finding = make("p", {class: "finding"});
  view.host = make("div", {class: "chart"});
  view.keys = make("ul", {class: "legend"});
  app.later(() => { view.chart = moeplan.chart(app, view.host); });
  return moeplan.section(id, title, view.finding, view.host, view.keys);
};

moeplan.legend = function (app, host, lines = true) {
  const {model} = app, look = moeplan.look();
  host.replaceChildren(...model.head.strategies.map((strategy, s) => {
    const key = make("i");
    key.style.setProperty("--c", look.strategy(model, s));
    return make("li", {title: strategy.about}, key, `${strategy.label}${lines ? moeplan.dashes[look.dash(model, s)] : ""}`);
  }));
};
moeplan.dashes = {solid: "", dotted: " (dotted)", dashed: " (dashed)"};

/** The step's layer, or where all are shown, the most uneven one of the step before anything is planned. */
moeplan.layerOf = function (app) {
  const {model, state} = app;
  if (state.l >= 0) return state.l;
  const values = model.head.layers.map((_, l) => model.imbalance(0, state.t, l));
  return values.indexOf(Math.max(...values));
};
moeplan.layerName = (app, l) => (l < 0 ? "all layers" : `layer ${app.model.head.layers[l]}`);

/* 1. How much is lost, and how much less under plans? */
moeplan.headline = {
  mount(app) {
    this.text = make("p", {class: "headline"});
    this.cards = make("div", {class: "cards"});
    this.table = make("div", {class: "scroll"});
    return make("section", {id: "headline", "aria-label": "What imbalance costs"}, this.text, this.cards, this.table);
  },
  draw(app) {
    const {model} = app, head = model.head, look = moeplan.look(), ours = model.ours;
    const shares = head.strategies.map((_, s) => model.lostShare(s));
    const b = (text) => make("b", {}, text);
    const about = head.kind === "job" ? "So far" : `Over ${moeplan.number(head.all_steps)} steps`;
    const first = head.kind === "job" ? "the layouts that the job began with" : "experts in order";
    const parts = [`With ${first}, `, b(moeplan.percent(shares[0])), " of the experts' time is waiting for the busiest device; with ", `${head.strategies[ours].label} `, b(moeplan.percent(shares[ours])), "."];
    if (model.timed) {
      const before = model.totals(0), after = model.totals(ours), saved = before.whole - after.whole;
      const moves = after.moves ? `, ${moeplan.time(after.moves)} for moving weights included` : "";
      parts.push(` ${about} that ${saved >= 0 ? "saves" : "costs"} `, b(moeplan.time(Math.abs(saved))), ` of ${moeplan.time(before.whole)}${moves}.`);
    }
    this.text.replaceChildren(...parts);
    this.cards.replaceChildren(...head.strategies.map((strategy, s) => {
      const values = model.rows.flatMap((row) => row.imbalance[s]);
      const card = make("div", {class: "card", "data-strategy": strategy.name}, make("div", {class: "name"}, strategy.label),
        make("div", {class: "big"}, moeplan.percent(shares[s])),
        make("p", {}, `of the experts' time is waiting: ${moeplan.number(100 - 100 * shares[s], 1)} % of what perfect balance would reach`),
        make("p", {}, `busiest device ${moeplan.number(moeplan.mean(values), 3)} × the mean`),
        make("p", {}, strategy.about));
      card.style.setProperty("--c", look.strategy(model, s));
      return card;
    }));
    this.table.replaceChildren();
    if (!model.timed) return;
    const column = (name) => make("th", {scope: "col"}, name);
    this.table.append(make("details", {}, make("summary", {}, "Seconds, by what they are spent on"),
      make("table", {id: "seconds-table"}, make("caption", {}, `Modelled: ${head.cost.text}.`),
        make("thead", {}, make("tr", {}, column("strategy"), column("in all"), column("experts, busiest device"), column("of it waiting"), column("exchange of tokens"), column("moving weights"))),
        make("tbody", {}, head.strategies.map((strategy, s) => {
          const all = model.totals(s);
          return make("tr", {"data-strategy": strategy.name}, make("th", {scope: "row"}, strategy.label), ["whole", "compute", "lost", "traffic", "moves"].map((name) => make("td", {"data-seconds": all[name]}, moeplan.time(all[name]))));
        })))));
  },
};

/* 2. When is it uneven, in which layers, and what changes it? */
moeplan.timeline = {
  mount(app) {
    this.finding = make("p", {class: "finding"});
    this.host = make("div", {class: "chart"});
    this.keys = make("ul", {class: "legend"});
    const section = moeplan.section("timeline", "When is it uneven?", this.finding, this.host, this.keys);
    app.later(() => {
      this.chart = moeplan.chart(app, this.host);
      this.chart.getZr().on("click", (event) => {
        const [x] = this.chart.convertFromPixel({gridIndex: 0}, [event.offsetX, event.offsetY]);
        if (this.chart.containPixel({gridIndex: 0}, [event.offsetX, event.offsetY])) app.goto(x);
      });
    });
    return section;
  },
  draw(app) {
    const {model, state} = app, look = moeplan.look(), ours = model.ours;
    const series = model.head.strategies.map((strategy, s) => ({
      type: "line", name: strategy.label, showSymbol: model.steps.length < 3, symbol: moeplan.decals[s % 4], z: s === ours ? 5 : 3,
      lineStyle: {width: s === ours ? 2.5 : 2, type: look.dash(model, s), color: look.strategy(model, s)}, itemStyle: {color: look.strategy(model, s)},
      data: model.steps.map((step, t) => [step, model.imbalance(s, t, state.l)]),
    }));
    const shifts = model.shifts(), first = model.steps[0], last = model.steps[model.steps.length - 1];
    const plans = model.plans.filter((row) => row.strategy === ours && row.changed && row.step !== null && row.step >= first && row.step <= last);
    const label = (text) => ({show: true, formatter: text, color: look.soft, position: "end", distance: 4, fontSize: 12});
    series[0].markLine = {
      symbol: "none", silent: true, animation: false,
      data: [
        {xAxis: model.steps[state.t], lineStyle: {color: look.ink, width: 1.5, type: "solid"}, label: {show: false}},
        ...shifts.map((t, i) => ({xAxis: model.steps[t], lineStyle: {color: look.shift, width: 9, type: "solid"}, label: i < shifts.length - 1 || this.host.clientWidth < 600 ? {show: false} : label("routing shifts")})),
      ],
    };
    series.push({type: "scatter", name: "plans", symbol: "triangle", symbolSize: 9, z: 6, silent: true, itemStyle: {color: look.strategy(model, ours)}, data: plans.map((row) => [row.step + 1, 1])});
    const worst = model.steps.map((_, t) => model.imbalance(0, t, state.l));
    const at = worst.indexOf(Math.max(...worst));
    this.chart.setOption({
      ...moeplan.base(look), grid: {left: 12, right: 22, top: 34, bottom: 64, containLabel: true},
      xAxis: moeplan.axis(look, "step", {type: "value", min: first, max: Math.max(last, first + 1), minInterval: 1, splitLine: {show: false}, nameGap: 26}),
      yAxis: moeplan.above(look, "busiest device ÷ mean (1 = perfect)", {type: "value", scale: true, min: 1}),
      dataZoom: [{type: "slider", height: 16, bottom: 4, borderColor: look.line, textStyle: {color: look.soft}, filterMode: "none"}],
      tooltip: {...moeplan.base(look).tooltip, trigger: "axis", axisPointer: {type: "line"}, formatter: (points) => {
        const t = model.steps.indexOf(points[0].value[0]);
        if (t < 0) return "";
        return moeplan.tip(`step ${model.steps[t]}, ${moeplan.layerName(app, state.l)}`, model.head.strategies.map((strategy, s) => [strategy.label, `${moeplan.number(model.imbalance(s, t, state.l), 3)} × mean`, look.strategy(model, s)]));
      }},
      series,
    }, {notMerge: true, lazyUpdate: false});
    const words = [`${state.l < 0 ? "Averaged over layers" : `In ${moeplan.layerName(app, state.l)}`}, static placement is most uneven at step ${model.steps[at]}: the busiest device has ${moeplan.number(worst[at], 2)} times the mean load, ${moeplan.number(model.imbalance(ours, at, state.l), 2)} times with ${model.head.strategies[ours].label}.`];
    if (model.head.kind === "job") words[0] = words[0].replace("static placement is", "the first layouts are");
    if (shifts.length) words.push(` Routing shifts at step ${shifts.map((t) => model.steps[t]).join(", ")} (bands): other experts become busy.`);
    if (plans.length) words.push(" Triangles: new layouts come into force.");
    words.push(" Click to go to a step.");
    this.finding.textContent = words.join("");
    this.host.setAttribute("aria-label", this.finding.textContent);
    moeplan.legend(app, this.keys);
  },
};

/* 3. The step that everything below shows. */
moeplan.controls = {
  mount(app) {
    this.step = make("input", {type: "range", id: "step", min: 0, step: 1, input: () => app.set({t: +this.step.value})});
    this.out = make("output", {for: "step", id: "step-out"});
    this.layer = make("select", {id: "layer", "aria-label": "Layer", change: () => app.set({l: +this.layer.value})},
      make("option", {value: -1}, "all layers"), app.model.head.layers.map((name, l) => make("option", {value: l}, `layer ${name}`)));
    const go = (by, text, words) => make("button", {type: "button", "aria-label": words, title: words, click: () => app.set({t: app.state.t + by})}, text);
    return make("section", {class: "bar", id: "controls", "aria-label": "Step and layer shown"},
      make("label", {class: "grow", for: "step"}, "Step", this.step), this.out, go(-1, "‹", "one step back"), go(1, "›", "one step on"),
      this.layer, app.model.head.kind === "job" ? this._follow(app) : null);
  },
  _follow(app) {
    this.box = make("input", {type: "checkbox", id: "follow", change: () => app.set({follow: this.box.checked})});
    return make("label", {for: "follow"}, this.box, "newest");
  },
  draw(app) {
    const {model, state} = app;
    this.step.max = model.steps.length - 1;
    this.step.value = state.t;
    this.step.setAttribute("aria-valuetext", `step ${model.steps[state.t]}`);
    this.out.textContent = `step ${model.steps[state.t]}`;
    this.layer.value = state.l;
    if (this.box) this.box.checked = state.follow;
  },
};

/* 4. Which experts are busy? */
moeplan.experts = {
  mount(app) {
    this.finding = make("p", {class: "finding", id: "experts-finding"});
    this.host = make("div", {class: "chart"});
    app.later(() => {
      this.chart = moeplan.chart(app, this.host);
      this.chart.on("click", (event) => app.set({l: event.value[1]}));
    });
    return moeplan.section("experts", "Which experts are busy?", this.finding, this.host);
  },
  draw(app) {
    const {model, state} = app, look = moeplan.look(), head = model.head, data = [];
    const tall = Math.max(200, Math.min(620, 110 + 24 * model.layers));
    if (this.tall !== tall) { this.tall = tall; this.host.style.height = `${tall}px`; this.chart.resize(); }
    let hottest = [0, 0, 0, 0];
    head.layers.forEach((_, l) => {
      const tokens = model.demand(state.t, l), mean = moeplan.sum(tokens) / head.experts || 1;
      tokens.forEach((count, e) => {
        data.push([e, l, count / mean, count]);
        if (count / mean > hottest[2]) hottest = [e, l, count / mean, count];
      });
    });
    if (this.most === undefined || head.kind === "job") { // one scale for all steps, so that colours can be compared
      this.most = 2;
      for (let t = 0; t < model.steps.length; t += Math.ceil(model.steps.length / 24)) {
        head.layers.forEach((_, l) => {
          const tokens = model.demand(t, l), mean = moeplan.sum(tokens) / head.experts || 1;
          for (const count of tokens) this.most = Math.max(this.most, count / mean);
        });
      }
      this.most = Math.ceil(this.most);
    }
    this.chart.setOption({
      ...moeplan.base(look), grid: {left: 12, right: 22, top: 14, bottom: 74, containLabel: true},
      xAxis: moeplan.axis(look, "expert", {type: "category", data: Array.from({length: head.experts}, (_, e) => e), splitLine: {show: false}, nameGap: 26}),
      yAxis: moeplan.axis(look, "layer", {type: "category", data: head.layers, inverse: true, nameGap: 36, splitLine: {show: false}}),
      visualMap: {min: 0, max: this.most, calculable: false, orient: "horizontal", left: "center", bottom: 0, itemHeight: 180, itemWidth: 12, text: [`${this.most} × the mean expert`, "0"], textStyle: {color: look.soft}, dimension: 2, inRange: {color: look.heat}},
      tooltip: {...moeplan.base(look).tooltip, formatter: (point) => moeplan.tip(`expert ${point.value[0]}, layer ${head.layers[point.value[1]]}`, [["tokens", moeplan.number(point.value[3])], ["times the mean expert", moeplan.number(point.value[2], 2)]])},
      series: [{type: "heatmap", data, encode: {x: 0, y: 1, value: 2}, progressive: 0, itemStyle: {borderColor: look.card, borderWidth: head.experts <= 128 ? 1 : 0}, emphasis: {itemStyle: {borderColor: look.ink, borderWidth: 2}}}],
    }, {notMerge: true});
    this.finding.replaceChildren(`At step ${model.steps[state.t]}, expert `, make("b", {"data-expert": hottest[0]}, `${hottest[0]}`), ` of layer ${head.layers[hottest[1]]} is the busiest: `, make("b", {"data-tokens": hottest[3]}, `${moeplan.number(hottest[3])} tokens`), `, ${moeplan.number(hottest[2], 1)} times as many as the mean expert.`);
    this.host.setAttribute("aria-label", this.finding.textContent);
  },
};

/* 5. What does a device compute, before and after? */
moeplan.devices = {
  mount(app) {
    this.finding = make("p", {class: "finding", id: "devices-finding"});
    this.panes = app.model.head.strategies.map((strategy, s) => ({s, title: make("h3"), host: make("div", {class: "chart low"})}));
    this.keys = make("ul", {class: "legend"});
    this.pick = make("select", {id: "device", change: () => app.set({device: +this.pick.value})}, app.model.head.speed.map((_, d) => make("option", {value: d}, `device ${d}`)));
    this.tables = make("div", {class: "pair", id: "device-tables"});
    const shown = this.panes.filter((pane) => pane.s === 0 || pane.s === app.model.ours);
    this.panes = shown;
    app.later(() => {
      for (const pane of shown) {
        pane.chart = moeplan.chart(app, pane.host);
        pane.chart.getZr().on("click", (event) => {
          const at = [event.offsetX, event.offsetY];
          if (pane.chart.containPixel({gridIndex: 0}, at)) app.set({device: Math.max(0, Math.min(app.model.head.devices - 1, pane.chart.convertFromPixel({gridIndex: 0}, at)[0]))});
        });
      }
    });
    return moeplan.section("devices", "What does each device compute?", this.finding,
      make("div", {class: "pair"}, shown.map((pane) => make("div", {}, pane.title, pane.host))), this.keys,
      make("p", {}, make("label", {for: "device"}, "Experts on ", this.pick)), this.tables);
  },
  draw(app) {
    const {model, state} = app, look = moeplan.look(), l = moeplan.layerOf(app), t = state.t, head = model.head;
    const demand = model.demand(t, l), mean = moeplan.sum(demand) / head.devices;
    const ranked = Array.from(demand.keys()).sort((a, b) => demand[b] - demand[a]);
    const colours = new Map(ranked.slice(0, moeplan.hot.length).map((e, i) => [e, moeplan.hot[i]]));
    const sides = this.panes.map((pane) => ({...pane, slots: model.devices(pane.s, t, l), loads: model.deviceLoads(pane.s, t, l)}));
    const top = Math.max(...sides.flatMap((side) => side.loads)) * 1.06;
    for (const side of sides) {
      const width = Math.max(...side.slots.map((slots) => slots.length));
      const sorted = side.slots.map((slots) => [...slots].sort((a, b) => b[1] - a[1]));
      const series = Array.from({length: width}, (_, j) => ({
        type: "bar", stack: "load", barCategoryGap: "18%", data: sorted.map((slots, d) => (slots[j] ? {value: slots[j][1], expert: slots[j][0], itemStyle: {color: colours.get(slots[j][0]) || look.rest[j % 2], borderColor: look.card, borderWidth: head.devices <= 32 ? 1 : 0, opacity: d === state.device ? 1 : 0.82}} : {value: 0})),
      }));
      series[0].markLine = {symbol: "none", silent: true, lineStyle: {color: look.ink, type: "dashed", width: 1.2}, label: {formatter: "mean", color: look.ink, position: "end", distance: 4}, data: [{yAxis: mean}]};
      series[0].markArea = {silent: true, itemStyle: {color: look.shift}, data: [[{xAxis: state.device}, {xAxis: state.device}]]};
      side.chart.setOption({
        ...moeplan.base(look), grid: {left: 12, right: 46, top: 34, bottom: 30, containLabel: true},
        xAxis: moeplan.axis(look, "device", {type: "category", data: head.speed.map((_, d) => `${d}`), splitLine: {show: false}, nameGap: 26}),
        yAxis: moeplan.above(look, "tokens", {type: "value", max: top, axisLabel: {color: look.soft, formatter: (value) => (value > mean * 20 || value === top ? "" : moeplan.number(value))}}),
        tooltip: {...moeplan.base(look).tooltip, formatter: (point) => (point.data.expert === undefined ? "" : moeplan.tip(`device ${point.dataIndex}, expert ${point.data.expert}`, [["tokens here", moeplan.number(point.data.value)], ["the expert's tokens", moeplan.number(demand[point.data.expert])], ["the device's tokens", moeplan.number(side.loads[point.dataIndex])], ["device ÷ mean", moeplan.number(side.loads[point.dataIndex] / mean, 3)]]))},
        series,
      }, {notMerge: true});
      side.title.textContent = `${head.strategies[side.s].label}: busiest ÷ mean ${moeplan.number(model.imbalance(side.s, t, l), 3)}`;
      const busiest = side.loads.indexOf(Math.max(...side.loads));
      side.host.setAttribute("aria-label", `${side.title.textContent}. Device ${busiest} is the busiest with ${moeplan.number(side.loads[busiest])} tokens, the mean is ${moeplan.number(mean)}.`);
    }
    const [before, after] = [sides[0], sides[sides.length - 1]];
    const busy = before.loads.indexOf(Math.max(...before.loads));
    this.finding.textContent = `Step ${model.steps[t]}, layer ${head.layers[l]}${state.l < 0 ? " (the most uneven one of this step)" : ""}: every device waits for device ${busy}, which has ${moeplan.number(before.loads[busy])} tokens where ${moeplan.number(mean)} would be even. With ${head.strategies[after.s].label} the busiest has ${moeplan.number(Math.max(...after.loads))}. Click a device to see its experts.`;
    this.keys.replaceChildren(...[...colours].map(([e, colour]) => {
      const key = make("i");
      key.style.setProperty("--c", colour);
      return make("li", {}, key, `expert ${e}`);
    }), make("li", {}, `grey: the other ${head.experts - colours.size} experts`));
    this.pick.value = state.device;
    this.tables.replaceChildren(...sides.map((side) => {
      const rows = [...side.slots[state.device]].sort((a, b) => b[1] - a[1]);
      return make("div", {class: "scroll"}, make("table", {"data-strategy": head.strategies[side.s].name},
        make("caption", {}, `${head.strategies[side.s].label}: device ${state.device} computes `, make("b", {"data-load": side.loads[state.device]}, moeplan.number(side.loads[state.device])), ` tokens, ${moeplan.number(side.loads[state.device] / mean, 3)} × the mean`),
        make("thead", {}, make("tr", {}, ["expert", "tokens here", "everywhere", "share"].map((name) => make("th", {scope: "col"}, name)))),
        make("tbody", {}, rows.map(([e, count]) => make("tr", {}, make("th", {scope: "row"}, `${e}`), make("td", {}, moeplan.number(count)), make("td", {}, moeplan.number(demand[e])), make("td", {}, demand[e] ? moeplan.percent(count / demand[e]) : "-"))))));
    }));
  },
};

/* 6. How much time is lost, and does moving pay? */
moeplan.losses = {
  still: true,
  mount(app) {
    return moeplan.charted(app, this, "losses", "Does it pay?");
  },
  draw(app) {
    const {model} = app, look = moeplan.look(), head = model.head;
    const lines = head.strategies.map((_, s) => {
      const lost = model.seconds(s, "lost"), moves = model.seconds(s, "moves");
      let sum = 0;
      return model.steps.map((step, t) => [step, (sum += lost[t] + moves[t])]);
    });
    const ends = lines.map((line) => line[line.length - 1][1]), all = head.strategies.map((_, s) => model.totals(s));
    this.finding.textContent = head.strategies.map((strategy, s) => `${strategy.label}: ${moeplan.time(ends[s])} lost${all[s].moves ? `, ${moeplan.time(all[s].moves)} of it to moving weights` : ""}`).join("; ") + " (modelled).";
    this.chart.setOption({
      ...moeplan.base(look),
      xAxis: moeplan.axis(look, "step", {type: "value", min: model.steps[0], max: model.steps[model.steps.length - 1], splitLine: {show: false}, nameGap: 26}),
      yAxis: moeplan.above(look, "seconds lost so far: waiting and moving", {type: "value"}),
      tooltip: {...moeplan.base(look).tooltip, trigger: "axis", formatter: (points) => moeplan.tip(`until step ${points[0].value[0]}`, points.map((point) => [point.seriesName, moeplan.time(point.value[1]), point.color]))},
      series: lines.map((data, s) => ({type: "line", name: head.strategies[s].label, showSymbol: false, data, lineStyle: {width: s === model.ours ? 2.5 : 2, type: look.dash(model, s), color: look.strategy(model, s)}, itemStyle: {color: look.strategy(model, s)}})),
    }, {notMerge: true});
    this.host.setAttribute("aria-label", this.finding.textContent);
    moeplan.legend(app, this.keys);
  },
};

/* 7. How uneven is it, how often? */
moeplan.histogram = {
  still: true,
  mount(app) {
    return moeplan.charted(app, this, "histogram", "How often is it how uneven?");
  },
  draw(app) {
    const {model} = app, look = moeplan.look(), head = model.head;
    const values = head.strategies.map((_, s) => model.rows.flatMap((row) => row.imbalance[s]).sort((a, b) => a - b));
    const edges = [1.001, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, Infinity];
    const most = Math.max(...values.map((list) => list[list.length - 1]));
    edges.splice(edges.findIndex((edge) => edge >= most) + 1);
    const names = edges.map((edge, i) => (edge === Infinity ? `> ${edges[i - 1]}` : `≤ ${edge}`));
    const series = values.map((list, s) => {
      const counts = edges.map(() => 0);
      for (const value of list) counts[edges.findIndex((edge) => value <= edge)] += 1;
      return {type: "bar", name: head.strategies[s].label, barGap: "0%", barCategoryGap: "12%", itemStyle: {color: look.strategy(model, s), decal: s === model.ours ? undefined : {symbol: s ? "rect" : "circle", color: look.card, symbolSize: 0.5, dashArrayX: 4, dashArrayY: 4}}, data: counts.map((count) => 100 * count / list.length)};
    });
    const p95 = values.map((list) => list[Math.min(list.length - 1, Math.floor(0.95 * list.length))]);
    this.finding.textContent = `19 of 20 layers and steps are below: ${head.strategies.map((strategy, s) => `${strategy.label} ${moeplan.number(p95[s], 2)}`).join(", ")} (busiest device ÷ mean).`;
    this.chart.setOption({
      ...moeplan.base(look),
      xAxis: moeplan.axis(look, "busiest device ÷ mean", {type: "category", data: names, splitLine: {show: false}, nameGap: 44, axisLabel: {color: look.soft, fontSize: 11, interval: 0, rotate: 45}}),
      yAxis: moeplan.above(look, "% of layers and steps", {type: "value"}),
      tooltip: {...moeplan.base(look).tooltip, trigger: "axis", axisPointer: {type: "shadow"}, formatter: (points) => moeplan.tip(`busiest ÷ mean ${points[0].name}${points[0].dataIndex ? `, above ${edges[points[0].dataIndex - 1]}` : ""}`, points.map((point) => [point.seriesName, `${moeplan.number(point.value, 1)} %`, point.color]))},
      series,
    }, {notMerge: true});
    this.host.setAttribute("aria-label", this.finding.textContent);
    moeplan.legend(app, this.keys, false);
  },
};

/* 8. Did forecasts come true? */
moeplan.truth = {
  still: true,
  mount(app) {
    const section = moeplan.charted(app, this, "truth", "Did the forecasts come true?");
    app.later(() => {
      this.chart.on("click", (event) => { if (event.data && event.data.step !== undefined) app.goto(event.data.step + 1, event.data.layer); });
    });
    return section;
  },
  draw(app) {
    const {model} = app, look = moeplan.look(), head = model.head;
    const found = head.strategies.map((_, s) => model.forecasts(s)), all = found.flat();
    const mine = found[model.ours];
    if (!all.length) {
      this.finding.textContent = "No plan has been followed by a step yet.";
      this.chart.clear();
      this.host.hidden = true;
      return;
    }
    this.host.hidden = false;
    const over = (one) => 100 * (one.truth / one.predicted - 1), name = head.strategies[model.ours].label;
    const mean = moeplan.mean(mine.map(over));
    this.finding.textContent = "Each point is a layer's plan: how much more uneven the steps until the next plan were than it promised; 0 is as promised." + (mine.length ? ` ${name}: ${moeplan.number(Math.abs(mean), 1)} % ${mean >= 0 ? "above" : "below"} on average.` : "");
    this.chart.setOption({
      ...moeplan.base(look),
      xAxis: moeplan.axis(look, "planned after step", {type: "value", min: model.steps[0], max: model.steps[model.steps.length - 1], splitLine: {show: false}, nameGap: 26}),
      yAxis: moeplan.above(look, "% above the promise", {type: "value"}),
      tooltip: {...moeplan.base(look).tooltip, formatter: (point) => moeplan.tip(`${point.seriesName}, layer ${head.layers[point.data.layer]}, planned after step ${point.data.step}`, [["promised", `${moeplan.number(point.data.predicted, 3)} × mean`], ["came", `${moeplan.number(point.data.truth, 3)} × mean`], ["steps", `${point.data.steps}`]])},
      series: found.map((list, s) => ({type: "scatter", name: head.strategies[s].label, symbol: moeplan.decals[s % 4], symbolSize: s === model.ours ? 8 : 5, z: s === model.ours ? 5 : 3, itemStyle: {color: look.strategy(model, s), opacity: s === model.ours ? 0.8 : 0.5}, data: list.map((one) => ({value: [one.row.step ?? model.steps[0], over(one)], layer: one.layer, step: one.row.step ?? -1, ...one, row: undefined}))})),
    }, {notMerge: true});
    this.host.setAttribute("aria-label", this.finding.textContent);
    moeplan.legend(app, this.keys, false);
  },
};

/* 9. What was decided, and why? */
moeplan.plans = {
  still: true,
  mount(app) {
    this.finding = make("p", {class: "finding"});
    this.body = make("tbody");
    const names = ["after step", "why", "layers", "promised", "came", "proven gap", "replicas moved", "takes", "saves"];
    this.table = make("table", {id: "plans-table"}, make("thead", {}, make("tr", {}, names.map((name, i) => make("th", {scope: "col", class: i === 1 ? "why" : null}, name)))), this.body);
    return moeplan.section("plans", "What was decided, and why?", this.finding, make("div", {class: "rows", tabindex: 0, role: "region", "aria-label": "Decisions"}, this.table));
  },
  draw(app) {
    const {model} = app, head = model.head, mine = model.plans.filter((row) => row.strategy === model.ours);
    const came = new Map();
    for (const one of model.forecasts(model.ours)) came.set(one.row, [...(came.get(one.row) || []), one.truth]);
    const gaps = mine.flatMap((row) => row.layers.map((layer) => layer.gap)).filter((gap) => gap !== null);
    const taken = mine.filter((row) => row.changed && row.reason !== "initial");
    const b = (text) => make("b", {}, text);
    this.finding.replaceChildren(...(gaps.length ? [`${taken.length} of ${mine.length} decisions changed layouts. Proven: on its forecast, no plan can be better by more than `, b(`${moeplan.number(100 * Math.max(...gaps), 2)} %`), ` (${moeplan.number(100 * moeplan.mean(gaps), 2)} % on average), whatever the layout.`] : ["No plan has been made yet."]));
    const weight = head.cost && head.cost.weight_bytes, cell = (text) => make("td", {}, text);
    this.body.replaceChildren(...mine.map((row) => {
      const values = row.layers.filter((layer) => layer.predicted);
      const mean = (name) => (values.length && values.every((layer) => layer[name] !== null) ? moeplan.mean(values.map((layer) => layer[name])) : null);
      const before = mean("before"), after = mean("predicted"), gap = mean("gap"), truth = came.get(row);
      const go = () => { if (row.step !== null) app.goto(row.step + 1); };
      return make("tr", {tabindex: row.step === null ? null : 0, "data-step": row.step, click: go, keydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); go(); } }},
        make("th", {scope: "row"}, row.step === null ? "start" : `${row.step}`),
        make("td", {class: "why"}, `${moeplan.reasons[row.reason] || row.reason}${row.detail ? `: ${row.detail}` : ""}`), cell(`${row.changed} of ${model.layers}`),
        cell(after === null ? "-" : `${before === null ? "" : `${moeplan.number(before, 3)} → `}${moeplan.number(after, 3)}`), cell(truth ? moeplan.number(moeplan.mean(truth), 3) : "-"),
        cell(gap === null ? "-" : `${moeplan.number(100 * gap, 2)} %`), cell(`${moeplan.number(row.moved)}${weight && row.moved ? ` (${moeplan.bytes(row.moved * weight)})` : ""}`),
        cell(row.move_s ? moeplan.time(row.move_s) : "-"), cell(row.gain_s > 0 && model.timed ? `${moeplan.time(row.gain_s)} a step` : "-"));
    }));
  },
};
