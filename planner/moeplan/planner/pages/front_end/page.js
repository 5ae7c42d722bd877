"use strict";
/* What the reader has chosen (it stands in the address after #), and where the document comes from. */

(() => {
  const make = moeplan.make, main = document.getElementById("main");
  const text = (id, value) => { document.getElementById(id).textContent = value; };

  /** The page of one document: views, and what is chosen. */
  class App {
    constructor(model) {
      this.model = model;
      this.charts = [];
      this.pending = [];
      this.state = {t: 0, l: -1, device: 0, follow: model.head.kind === "job"};
      this.views = [moeplan.headline, moeplan.timeline, moeplan.controls, moeplan.experts, moeplan.devices];
      const below = [...(model.timed ? [moeplan.losses] : []), moeplan.histogram, moeplan.truth];
      main.append(...this.views.map((view) => view.mount(this)));
      main.append(make("div", {class: "beside"}, below.map((view) => view.mount(this))));
      main.append(moeplan.plans.mount(this));
      this.views.push(...below, moeplan.plans);
      for (const act of this.pending) act();
      this.later = (act) => act();
      this.read();
      this.draw();
      addEventListener("hashchange", () => { this.read(); this.draw(); });
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    }

    /** Do something once the views are in the page. */
    later(act) { this.pending.push(act); }

    /** Take what the address says. */
    read() {
      const given = new URLSearchParams(location.hash.slice(1)), {steps, head} = this.model;
      if (given.has("step")) {
        const wanted = Number(given.get("step"));
        const at = steps.findIndex((step) => step >= wanted);
        this.state.t = at < 0 ? steps.length - 1 : at;
        this.state.follow = false;
      } else this._worst();
      if (given.has("layer")) this.state.l = head.layers.indexOf(Number(given.get("layer")));
      const loads = this.model.deviceLoads(0, this.state.t, moeplan.layerOf(this));
      this.state.device = loads.indexOf(Math.max(...loads));
      if (given.has("device")) this.state.device = this._within(Number(given.get("device")), head.devices);
    }

    _worst() { // begin where there is something to see: the step that loses most, or the newest one of a job
      const values = this.model.steps.map((_, t) => this.model.imbalance(0, t, -1));
      this.state.t = this.state.follow ? values.length - 1 : values.indexOf(Math.max(...values));
    }

    _within(value, count) { return Math.max(0, Math.min(count - 1, Math.round(value) || 0)); }

    /** Choose a step, a layer or a device. */
    set(change) {
      if (change.t !== undefined && change.follow === undefined) change.follow = false;
      Object.assign(this.state, change);
      if (this.state.follow) this.state.t = this.model.steps.length - 1;
      this.state.t = this._within(this.state.t, this.model.steps.length);
      const given = new URLSearchParams(location.hash.slice(1));
      if (this.state.follow) given.delete("step");
      else given.set("step", this.model.steps[this.state.t]);
      if (this.state.l < 0) given.delete("layer");
      else given.set("layer", this.model.head.layers[this.state.l]);
      given.set("device", this.state.device);
      history.replaceState(null, "", `#${given}`);
      cancelAnimationFrame(this.frame);
      this.frame = requestAnimationFrame(() => this.draw(true));
    }

    /** Choose the step nearest to a number. */
    goto(step, l) {
      const {steps} = this.model;
      let best = 0;
      steps.forEach((one, t) => { if (Math.abs(one - step) < Math.abs(steps[best] - step)) best = t; });
      this.set(l === undefined ? {t: best} : {t: best, l});
    }

    /** Draw all views, or those that show the chosen step. */
    draw(moved = false) {
      for (const view of this.views) if (!moved || !view.still) view.draw(this);
      document.documentElement.dataset.step = this.model.steps[this.state.t];
    }
  }
  moeplan.App = App;

  moeplan.subject = function (head) {
    const spare = head.devices * head.slots - head.experts;
    return `${head.layers.length} layers of ${head.experts} experts on ${head.devices} devices with ${head.slots} slots each (${spare} spare)`;
  };

  async function report(data) {
    const head = data.head, model = new moeplan.Model(head);
    for (const chunk of data.chunks) await model.append(chunk);
    model.plans = data.plans;
    text("title", head.title);
    text("subject", `${moeplan.number(head.all_steps)} steps, ${moeplan.subject(head)}`);
    moeplan.app = new App(model);
    const notes = [
      "The busiest device of a layer is waited for by all others: busiest ÷ mean is the imbalance, and 1 is perfect. Of the busiest device's time, 1 − 1 ÷ imbalance is waiting, for the mean device.",
      `Time is modelled, not measured: ${head.cost.text}; forward and backward take three forward times; a step waits for its slowest device, for the exchange of tokens, and for the weights that a plan moves before it.`,
      `Plans see only steps before those that they are judged on. Steps count from 0${head.first_step ? `; the trace's first is training step ${moeplan.number(head.first_step)}` : ""}.`,
    ];
    if (head.thinned > 1) notes.unshift(`The trace is long: every ${head.thinned}th step is shown. Seconds are of all steps.`);
    document.getElementById("foot").append(...notes.map((note) => make("p", {}, note)));
    document.documentElement.dataset.ready = "yes";
  }

  /* The live page: jobs, and one job as a stream. */

  const state = (words, lost = false) => {
    text("state", words);
    document.getElementById("state").className = lost ? "lost" : "";
  };

  /** Ask for a token; the daemon keeps it, the browser a cookie that scripts cannot read. */
  function signIn() {
    const field = make("input", {type: "password", id: "token", autocomplete: "off", required: true, size: 36});
    const said = make("p", {class: "silent", role: "alert"});
    main.replaceChildren(make("section", {id: "sign-in", "aria-label": "Sign in"}, make("form", {submit: async (event) => {
      event.preventDefault();
      const answer = await fetch("session", {method: "POST", body: field.value});
      if (answer.ok) location.reload();
      else said.textContent = await answer.text();
    }}, make("label", {for: "token"}, "Token of the daemon"), field, make("button", {}, "Sign in")), said));
    text("title", "Sign in");
    field.focus();
    document.documentElement.dataset.ready = "yes";
  }

  const ranks = (job) => `${job.connected} of ${job.ranks}`;

  async function jobs() {
    try {
      const answer = await fetch("jobs");
      if (answer.status === 401) return signIn();
      if (!answer.ok) return state(await answer.text(), true);
      const found = await answer.json();
      state("");
      text("title", found.length === 1 ? "1 job" : `${found.length} jobs`);
      const names = ["job", "ranks", "step", "plan", "promised imbalance", "newest decision"];
      main.replaceChildren(make("section", {"aria-label": "Jobs"}, found.length ? make("div", {class: "scroll"}, make("table", {id: "jobs-table"},
        make("thead", {}, make("tr", {}, names.map((name, i) => make("th", {scope: "col", class: i === 5 ? "why" : null}, name)))),
        make("tbody", {}, found.map((job) => make("tr", {}, make("th", {scope: "row"}, make("a", {href: `#job=${encodeURIComponent(job.id)}`}, job.id)),
          make("td", {class: job.connected < job.ranks ? "silent" : null}, ranks(job)), make("td", {}, job.step === null ? "-" : `${job.step}`), make("td", {}, `${job.version}`),
          make("td", {}, job.imbalance === null ? "-" : moeplan.number(job.imbalance, 3)), make("td", {class: "why"}, moeplan.reasons[job.reason] || job.reason)))))) : make("p", {}, "No job has been created at this daemon yet.")));
      document.documentElement.dataset.ready = "yes";
    } catch {
      state("the daemon does not answer; trying again", true);
    }
    setTimeout(() => { if (!location.hash.includes("job=")) jobs(); }, 2000);
  }

  /** What is going on in a job, in a few words each. */
  function tiles(list, job) {
    const tile = (name, value, kind) => make("div", {}, make("dt", {}, name), make("dd", {class: kind || null}, value));
    const more = job.ranks - job.connected - job.silent.length;
    const age = job.created === null ? "" : `, ${moeplan.time(Math.max(0, (Date.now() - Date.parse(job.created)) / 1000))} old`;
    list.replaceChildren(
      tile("newest step", job.step === null ? "none yet" : `${job.step}`),
      tile("ranks that report", ranks(job), job.connected < job.ranks ? "silent" : "fine"),
      tile("silent ranks", job.silent.length ? `${job.silent.join(", ")}${more > 0 ? ` and ${more} more` : ""}` : "none", job.silent.length ? "silent" : "fine"),
      tile("plan", `version ${job.version}${age}`), tile("in force on ranks", job.applied ? `version ${job.applied}` : "first layouts"),
      tile("newest decision", `${moeplan.reasons[job.reason] || job.reason}${job.detail ? `: ${job.detail}` : ""}`),
      tile("policy", job.policy), tile("late statistics", moeplan.number(job.late), job.late ? "silent" : null));
  }

  function watch(id) {
    let head = null, model = null, queue = Promise.resolve();
    const list = make("dl", {class: "tiles"}), waiting = make("p", {class: "finding"}, "Waiting for the first step of all layers.");
    text("title", id);
    main.replaceChildren(make("section", {id: "now", "aria-label": "What is going on"}, list, waiting));
    const source = new EventSource(`jobs/${encodeURIComponent(id)}/stream`);
    const on = (name, act) => source.addEventListener(name, (event) => {
      const value = JSON.parse(event.data);
      queue = queue.then(() => act(value)).catch((error) => { state(`${error}`, true); throw error; });
    });
    on("head", (value) => {
      if (head && JSON.stringify(head) !== JSON.stringify(value)) return location.reload(); // another start of the job
      if (head) return null;
      head = value;
      model = new moeplan.Model(head);
      text("subject", moeplan.subject(head));
      document.getElementById("foot").append(...head.notes.map((note) => make("p", {}, note)));
      document.documentElement.dataset.ready = "yes";
      return null;
    });
    on("status", (value) => { state("live"); tiles(list, value); });
    on("plans", (rows) => {
      model.plans = rows;
      if (moeplan.app) moeplan.app.draw();
    });
    on("ended", (why) => { state(why, true); source.close(); });
    on("chunk", async (chunk) => {
      const kept = moeplan.app && moeplan.app.state.t < model.steps.length ? model.steps[moeplan.app.state.t] : null;
      await model.append(chunk);
      model.keep(head.most_steps);
      if (!moeplan.app) {
        waiting.remove();
        moeplan.app = new App(model);
        return;
      }
      const {app} = moeplan;
      app.state.t = app.state.follow ? model.steps.length - 1 : Math.max(0, model.steps.indexOf(kept));
      app.draw();
    });
    source.onerror = async () => {
      state("the daemon does not answer; trying again", true);
      if (source.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
      try {
        const answer = await fetch("jobs");
        if (answer.status === 401) return signIn();
        if (answer.ok && !(await answer.json()).some((job) => job.id === id)) return state("no such job at this daemon", true);
      } catch { /* no answer: go on trying */ }
      setTimeout(() => location.reload(), 2000);
    };
  }

  moeplan.live = function () {
    const chosen = () => new URLSearchParams(location.hash.slice(1)).get("job");
    const id = chosen();
    addEventListener("hashchange", () => { if (chosen() !== id) location.reload(); });
    document.getElementById("home").setAttribute("href", "#");
    if (id) watch(id);
    else jobs();
  };

  const embedded = document.getElementById("document");
  if (embedded) report(JSON.parse(embedded.textContent));
  else moeplan.live();
})();
