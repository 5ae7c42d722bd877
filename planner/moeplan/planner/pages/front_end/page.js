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
      if (given.has("device")) this.state.device = this._within(Number(given.get("device")), head.devices);
    }

    _worst() { // begin where there is something to see: the step that loses most, or the newest one of a job
      const values = this.model.steps.map((_, t) => this.model.imbalance(0, t, -1));
      this.state.t = this.state.follow ? values.length - 1 : values.indexOf(Math.max(...values));
      const loads = this.model.deviceLoads(0, this.state.t, moeplan.layerOf(this));
      this.state.device = loads.indexOf(Math.max(...loads));
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

  const embedded = document.getElementById("document");
  if (embedded) report(JSON.parse(embedded.textContent));
  else if (moeplan.live) moeplan.live();
})();
