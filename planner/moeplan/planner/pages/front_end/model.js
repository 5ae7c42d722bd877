"use strict";
/* What a document says (its form is in document.py), as arrays; and what follows from it: imbalance, shifts, sums. */

const moeplan = {};

/** Unpack little-endian 32-bit integers or doubles, deflated and in base64. */
moeplan.unpack = async function (packed) {
  const text = atob(packed.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const big = packed.dtype === "<f8";
  const view = new DataView(buffer), size = big ? 8 : 4;
  const values = big ? new Float64Array(buffer.byteLength / size) : new Int32Array(buffer.byteLength / size);
  for (let i = 0; i < values.length; i++) {
    values[i] = big ? view.getFloat64(i * size, true) : view.getInt32(i * size, true);
  }
  return {shape: packed.shape, values};
};

moeplan.sum = (values) => values.reduce((total, value) => total + value, 0);
moeplan.mean = (values) => (values.length ? moeplan.sum(values) / values.length : NaN);

moeplan.Model = class {
  constructor(head) {
    this.head = head;
    this.steps = [];
    this.plans = [];
    this.rows = []; // one per step: {chunk, index, demand, loads, ...}
    this.speed = moeplan.sum(head.speed);
  }

  get layers() { return this.head.layers.length; }
  get ours() { return this.head.strategies.length - 1; }

  /** Take in a chunk of steps that come after those that are here. */
  async append(chunk) {
    const demand = await moeplan.unpack(chunk.demand);
    const strategies = [];
    for (const strategy of chunk.strategies) {
      strategies.push({
        layouts: await moeplan.unpack(strategy.layouts), loads: await moeplan.unpack(strategy.loads),
        version: strategy.version, seconds: strategy.seconds,
      });
    }
    chunk.steps.forEach((step, index) => {
      if (this.steps.length && step <= this.steps[this.steps.length - 1]) return; // sent before, as after a reconnect
      const row = {index, demand, strategies, imbalance: []};
      row.imbalance = strategies.map((_, s) => this.head.layers.map((_, l) => this._imbalance(row, s, l)));
      this.steps.push(step);
      this.rows.push(row);
    });
  }

  /** Forget the oldest steps, but for `count`. */
  keep(count) {
    const extra = this.steps.length - count;
    if (extra > 0) { this.steps.splice(0, extra); this.rows.splice(0, extra); }
  }

  /** Tokens of each expert. */
  demand(t, l) {
    const row = this.rows[t], experts = this.head.experts, at = (row.index * this.layers + l) * experts;
    return row.demand.values.subarray(at, at + experts);
  }

  /** [[expert, tokens], ...] of each device, under a strategy. */
  devices(s, t, l) { return this._devices(this.rows[t], s, l); }

  _devices(row, s, l) {
    const {layouts, loads, version} = row.strategies[s];
    const [, layers, devices, slots] = loads.shape;
    const load = (row.index * layers + l) * devices * slots;
    const layout = (version[row.index] * layers + l) * devices * slots;
    return this.head.speed.map((_, d) => {
      const found = [];
      for (let j = d * slots; j < (d + 1) * slots; j++) {
        if (layouts.values[layout + j] >= 0) found.push([layouts.values[layout + j], loads.values[load + j]]);
      }
      return found;
    });
  }

  /** Tokens of each device. */
  deviceLoads(s, t, l) { return this.devices(s, t, l).map((slots) => moeplan.sum(slots.map((slot) => slot[1]))); }

  _imbalance(row, s, l) {
    const loads = this._devices(row, s, l).map((slots) => moeplan.sum(slots.map((slot) => slot[1])));
    const total = moeplan.sum(loads);
    return total ? Math.max(...loads.map((load, d) => load / this.head.speed[d])) * this.speed / total : 1;
  }

  /** Largest load per speed over the mean; of all layers on average where l is -1. */
  imbalance(s, t, l) {
    const row = this.rows[t].imbalance[s];
    return l < 0 ? moeplan.mean(row) : row[l];
  }

  /** Whether seconds are known. */
  get timed() { return this.rows.length > 0 && this.rows[0].strategies.every((strategy) => strategy.seconds); }

  seconds(s, name) { return this.rows.map((row) => row.strategies[s].seconds[name][row.index]); }

  /** Time of all steps shown: compute, the part of it lost to imbalance, traffic, moves. */
  totals(s) {
    const found = {};
    for (const name of ["compute", "lost", "traffic", "moves"]) found[name] = moeplan.sum(this.seconds(s, name));
    found.whole = found.compute + found.traffic + found.moves;
    return found;
  }

  /** Share of the experts' time that the mean device waits for the busiest: 1 - 1 / imbalance, weighted by time. */
  lostShare(s) {
    if (this.timed) {
      const all = this.totals(s);
      return all.compute ? all.lost / all.compute : 0;
    }
    let most = 0, mean = 0;
    for (const row of this.rows) {
      for (const value of row.imbalance[s]) { most += value; mean += 1; }
    }
    return most ? 1 - mean / most : 0;
  }

  /** Steps at which routing shifts for good: the shares of five steps differ from those of the five before by much more
   * than they do at other steps near, half the sum of differences, 0 to 1. A slow drift is none. */
  shifts() {
    const key = `${this.steps[0]} ${this.steps.length}`;
    if (this._shifts !== key) { this._shifts = key; this._found = this._look(); }
    return this._found;
  }

  _look() {
    const span = 5, near = 30, count = this.steps.length;
    const changes = this.steps.map((_, t) => (t < span || t > count - span ? 0 : this._change(t, span)));
    return this.steps.map((_, t) => t).filter((t) => {
      if (!changes[t] || changes[t] < Math.max(0.02, ...changes.slice(Math.max(0, t - span), t + span + 1))) return false;
      const around = changes.filter((change, i) => change && Math.abs(i - t) <= near && Math.abs(i - t) > span).sort((a, b) => a - b);
      return around.length >= 2 * span && changes[t] > 1.4 * around[around.length >> 1] && changes[t] > 1.05 * around[around.length - 1];
    });
  }

  _change(t, span) {
    let change = 0;
    for (let l = 0; l < this.layers; l++) {
      const difference = new Float64Array(this.head.experts);
      for (let i = t - span; i < t + span; i++) {
        const tokens = this.demand(i, l), sign = (i < t ? -1 : 1) / (span * moeplan.sum(tokens) || 1);
        for (let e = 0; e < tokens.length; e++) difference[e] += sign * tokens[e];
      }
      change += moeplan.sum(difference.map(Math.abs)) / 2 / this.layers;
    }
    return change;
  }

  /** Plans that were taken: {row, layer, predicted, truth}: what a plan said of a layer, and its steps until the next. */
  forecasts(s) {
    const taken = this.plans.filter((row) => row.strategy === s && row.layers.some((layer) => layer.predicted));
    const found = [];
    this.head.layers.forEach((_, l) => {
      const mine = taken.map((row) => [row, row.layers.find((layer) => layer.layer === l)]).filter((pair) => pair[1] && pair[1].predicted);
      mine.forEach(([row, layer], i) => {
        const from = row.step === null ? -1 : row.step, until = i + 1 < mine.length ? mine[i + 1][0].step : Infinity;
        const truth = this.steps.map((step, t) => [step, t]).filter(([step]) => step > from && step <= until).map(([, t]) => this.imbalance(s, t, l));
        if (truth.length) found.push({row, layer: l, predicted: layer.predicted, truth: moeplan.mean(truth), steps: truth.length});
      });
    });
    return found;
  }
};
