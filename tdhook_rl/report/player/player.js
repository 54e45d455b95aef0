// The episode player: one timeline drives everything that is known of a step.
//
// A page holds any number of <section class="tdp" data-player="NAME"> with their data as JSON. Arrays come packed (few
// bits for each number, zlib, base64), and are read one row, which is one step, at a time.
"use strict";
(() => {
  const UP = [213, 94, 0], DOWN = [0, 114, 178]; // of Okabe and Ito (2008): what pushes the explained number up, or down
  const LANE = 34, AXIS = 20;

  // ------------------------------------------------------------------ unpacking

  async function inflate(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // An array whose rows are read one by one.
  class Rows {
    constructor(spec, bytes) {
      this.spec = spec;
      this.features = spec.shape.slice(1);
      const count = this.features.reduce((product, size) => product * size, 1);
      this.entries = spec.code === "colours" ? count / 3 : count;
      this.line = Math.ceil((this.entries * spec.bits) / 8);
      this.bytes = bytes;
      this.known = new Map();
      if (spec.delta) for (let at = this.line; at < bytes.length; at++) bytes[at] ^= bytes[at - this.line];
    }

    code(row, entry) {
      const { bits } = this.spec, start = row * this.line;
      if (bits === 8) return this.bytes[start + entry];
      if (bits === 16) return this.bytes[start + entry] | (this.bytes[start + this.entries + entry] << 8);
      const each = 8 / bits, byte = this.bytes[start + Math.floor(entry / each)];
      return (byte >> (8 - bits - (entry % each) * bits)) & ((1 << bits) - 1);
    }

    // The numbers of a row; NaN for what was not computed.
    row(row) {
      if (this.known.has(row)) return this.known.get(row);
      const { code, values, low, step } = this.spec, found = new Float32Array(this.entries);
      for (let entry = 0; entry < this.entries; entry++) {
        const one = this.code(row, entry), column = low && low.length > 1 ? entry : 0;
        if (code === "list") found[entry] = values[one] === null ? NaN : values[one];
        else found[entry] = one ? low[column] + (one - 1) * step[column] : NaN;
      }
      if (this.known.size > 400) this.known.clear();
      this.known.set(row, found);
      return found;
    }

    // The smallest and the largest number of each column.
    limits() {
      if (this.found) return this.found;
      const low = new Float32Array(this.entries).fill(Infinity), high = new Float32Array(this.entries).fill(-Infinity);
      for (let row = 0; row < this.spec.shape[0]; row++) {
        this.row(row).forEach((value, entry) => {
          if (value < low[entry]) low[entry] = value;
          if (value > high[entry]) high[entry] = value;
        });
      }
      return (this.found = { low, high });
    }

    // Red, green and blue of a picture, one after the other.
    picture(row) {
      if (this.last && this.last.row === row) return this.last.found;
      const { code, bits, values } = this.spec, start = row * this.line;
      let found = this.bytes.subarray(start, start + this.line);
      if (code === "colours") {
        found = new Uint8Array(3 * this.entries);
        const mask = (1 << bits) - 1;
        for (let pixel = 0, at = start, shift = 8 - bits; pixel < this.entries; pixel++) {
          const colour = values[(this.bytes[at] >> shift) & mask];
          found[3 * pixel] = colour >> 16;
          found[3 * pixel + 1] = colour >> 8;
          found[3 * pixel + 2] = colour;
          if (shift) shift -= bits;
          else (at += 1), (shift = 8 - bits);
        }
      }
      this.last = { row, found };
      return found;
    }
  }

  // ------------------------------------------------------------------ small things

  // An element; attributes that are functions are listeners, and false ones are left out.
  function make(tag, attributes = {}, ...children) {
    const drawn = ["svg", "path", "line", "rect", "circle", "text", "g", "title"].includes(tag) && attributes.svg !== false;
    const node = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") node.addEventListener(name, value);
      else if (name !== "svg" && value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  function short(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (value === 0 || Object.is(value, -0)) return "0";
    const size = Math.abs(value);
    const text = size >= 1e6 || size < 1e-3 ? value.toExponential(2) : String(size >= 100 ? Math.round(value) : Number(value.toPrecision(3)));
    return text.replaceAll("-", "−");
  }

  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const total = (values) => values.reduce((sum, value) => sum + value, 0);
  const cut = (text, most) => (text.length > most ? `…${text.slice(1 - most)}` : text);
  const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

  function range(values) {
    let low = Infinity, high = -Infinity;
    for (const value of values) if (Number.isFinite(value)) (low = Math.min(low, value)), (high = Math.max(high, value));
    return low > high ? null : [low, high];
  }

  function largest(values) {
    let best = -1;
    values.forEach((value, index) => {
      if (Number.isFinite(value) && (best < 0 || value > values[best])) best = index;
    });
    return best;
  }

  function entropy(weights) {
    return total([...weights].map((weight) => (weight > 0 ? -weight * Math.log(weight) : 0)));
  }

  // Signs that not every font has.
  const ICONS = {
    first: "M3 2h2v12h-2zM13 2v12l-7-6z", back: "M12 2v12l-8-6z", play: "M4 2v12l9-6z", on: "M4 2v12l8-6z",
    last: "M11 2h2v12h-2zM3 2v12l7-6z", pause: "M4 2h3v12h-3zM9 2h3v12h-3z",
  };
  const icon = (name) => make("svg", { viewBox: "0 0 16 16", width: 13, height: 13, "aria-hidden": "true" }, make("path", { d: ICONS[name], fill: "currentColor" }));

  let numbers = 0; // of labels that point to what they name

  function choice(label, options, pick) {
    const id = `tdp-${++numbers}`;
    const select = make("select", { id, change: () => pick(select.value) });
    for (const [value, text] of options) select.append(make("option", { value }, text));
    return { select, node: make("label", { class: "tdp-field", for: id }, make("span", {}, label), select) };
  }

  // ------------------------------------------------------------------ the player

  class Player {
    constructor(root, told, arrays) {
      Object.assign(this, { root, told, arrays, name: root.dataset.player });
      this.sets = told.sets;
      this.state = { episode: 0, step: 0, agent: 0, view: "", target: "", plane: "", site: "", opacity: 0.65, speed: 4 };
      this.timer = null;
      this.build();
      this.choose({});
      new ResizeObserver(() => this.drawLanes()).observe(this.root);
    }

    // What is shown of the chosen agent, of a kind.
    tracks(kind, role) {
      return this.told.tracks.filter((track) => track.kind === kind && (!role || track.role === role)
        && (track.agent === null || track.agent === this.state.agent));
    }

    get episode() { return this.told.episodes[this.state.episode]; }
    get length() { return Math.max(...this.episode.parts.map((part) => (part ? part.length : 0))); }
    get attribution() {
      const found = this.tracks("attribution");
      return found.find((track) => track.name === this.state.target) || (this.state.target === "(none)" ? null : found[0]);
    }
    get view() {
      const found = this.told.views.filter((view) => view.agent === null || view.agent === this.state.agent);
      return found.find((view) => view.name === this.state.view) || found[0];
    }

    // The row of a step of a part; a part that has ended stays at its last step.
    at(part, step = this.state.step) { return part.start + Math.min(step, part.length - 1); }
    values(track, part, step) { return this.arrays[track.array].row(this.at(part, step)); }
    series(track, part, entry = 0) {
      return Array.from({ length: part.length }, (_, step) => this.values(track, part, step)[entry]);
    }

    // ---------------------------------------------------------------- building

    build() {
      const { root, told } = this;
      root.tabIndex = 0;
      root.querySelector(".tdp-still").remove();
      const episodes = told.episodes.map((one, index) => [index, this.titleOf(one)]);
      this.episodes = choice("Episode", episodes, (value) => this.choose({ episode: Number(value), step: 0 }));
      this.agents = choice("Agent", told.agents.map((name, index) => [index, name]), (value) => this.choose({ agent: Number(value) }));
      this.agents.node.hidden = told.agents.length < 2;
      this.look = make("div", { class: "tdp-look" });
      this.stages = make("div", { class: "tdp-sets" });
      this.lanes = make("div", {
        class: "tdp-time", role: "slider", tabindex: "0", "aria-label": "Step", "aria-valuemin": "0",
        pointerdown: (event) => this.seek(event, true), pointermove: (event) => this.seek(event, false),
      });
      this.more = make("div", { class: "tdp-sets tdp-more" });
      this.words = make("div", { class: "tdp-words" });
      this.text = make("details", { class: "tdp-text", toggle: () => this.say() }, make("summary", {}, "This step in words"), this.words);
      this.live = make("p", { class: "tdp-live", role: "status", "aria-live": "polite" });
      root.append(
        make("div", { class: "tdp-head" }, make("h2", {}, told.title || "Episodes"), this.episodes.node, this.agents.node),
        this.look, this.stages, this.transport(), this.lanes, this.more, this.text, this.about(), this.live,
      );
      root.addEventListener("keydown", (event) => this.key(event));
    }

    titleOf(episode) {
      const parts = episode.parts.filter(Boolean).map((part) => `${part.total === null ? "" : short(part.total) + " in "}${part.length} steps`);
      return `${episode.name} (${parts.join(" / ")})`;
    }

    transport() {
      const button = (label, sign, press, keys) => make("button", { type: "button", title: `${label} (${keys})`, "aria-label": label, click: press }, icon(sign));
      this.play = button("Play", "play", () => this.toggle(), "space");
      this.counter = make("output", { class: "tdp-counter" });
      const speeds = [1, 2, 4, 8, 16].map((speed) => [speed, `${speed} steps/s`]);
      const speed = choice("Speed", speeds, (value) => {
        this.state.speed = Number(value);
        if (this.timer) (this.toggle(), this.toggle());
      });
      speed.select.value = "4";
      this.link = make("a", { class: "tdp-link", title: "An address that leads to this step", "aria-label": "Link to this step" }, "Link");
      this.link.hidden = location.protocol === "about:";
      this.jumps = make("div", { class: "tdp-jumps", role: "group", "aria-label": "Go to" });
      const buttons = make("div", { class: "tdp-buttons", role: "group", "aria-label": "Steps" },
        button("First step", "first", () => this.go(0), "Home"), button("Step back", "back", () => this.go(this.state.step - 1), "left"),
        this.play, button("Step on", "on", () => this.go(this.state.step + 1), "right"), button("Last step", "last", () => this.go(this.length - 1), "End"));
      return make("div", { class: "tdp-bar" }, make("div", { class: "tdp-move" }, buttons, this.counter),
        make("div", { class: "tdp-goto" }, speed.node, this.jumps, this.link));
    }

    about() {
      const keys = "Left and right: a step. Page up and down: ten. Home, End: first and last. Space: play. U: most uncertain step. "
        + "A: largest attribution. P: where a probe's reading changes next. D: where the two first differ.";
      const notes = this.told.notes.map((note) => make("li", {}, note));
      return make("details", { class: "tdp-text" }, make("summary", {}, notes.length ? `Keys, and what is not shown (${notes.length})` : "Keys"),
        make("p", {}, keys), notes.length ? make("ul", {}, ...notes) : null);
    }

    // Take other choices, and draw all that depends on them.
    choose(change) {
      Object.assign(this.state, change);
      const { state } = this;
      state.episode = clamp(state.episode || 0, 0, this.told.episodes.length - 1);
      this.episodes.select.value = state.episode;
      this.agents.select.value = state.agent;
      this.drawLook();
      this.drawStages();
      this.drawLanes();
      this.drawJumps();
      this.go(state.step);
    }

    // ---------------------------------------------------------------- what is looked at

    drawLook() {
      const { state } = this;
      const views = this.told.views.filter((view) => view.agent === null || view.agent === state.agent);
      const targets = this.tracks("attribution").map((track) => [track.name, track.name]);
      const track = this.attribution;
      this.look.replaceChildren();
      this.look.hidden = !views.length && !targets.length;
      if (views.length > 1) {
        const frames = choice("Frames", views.map((view) => [view.name, view.name]), (value) => this.choose({ view: value }));
        frames.select.value = this.view.name;
        this.look.append(frames.node);
      }
      if (targets.length) {
        const pick = choice("Attribution of", [...targets, ["(none)", "none"]], (value) => this.choose({ target: value, plane: "" }));
        pick.select.value = track ? track.name : "(none)";
        this.look.append(pick.node);
      }
      if (!track) return;
      if (track.planes && track.planes.length > 1) {
        const planes = choice("Plane", [["", "all: the largest"], ...track.planes.map((name, index) => [index, name])], (value) => this.choose({ plane: value }));
        planes.select.value = state.plane;
        this.look.append(planes.node);
      }
      if (this.over(track)) {
        const id = `tdp-${++numbers}`;
        const slider = make("input", { id, type: "range", min: 0, max: 100, value: Math.round(100 * state.opacity), input: () => {
          state.opacity = slider.value / 100;
          this.drawFrames();
        } });
        this.look.append(make("label", { class: "tdp-field", for: id }, make("span", {}, "Opacity"), slider));
      }
      const ends = [track.signed ? short(-track.scale) : "0", short(track.scale)];
      this.look.append(make("div", { class: "tdp-legend", role: "img", "aria-label": `Colours from ${ends[0]} to ${ends[1]}` },
        make("span", {}, ends[0]), make("i", { class: track.signed ? "tdp-both" : "tdp-up" }), make("span", {}, ends[1])));
    }

    // Whether an attribution lies over the frames that are shown.
    over(track) { return Boolean(track && this.view && track.layout === "map" && track.over.includes(this.view.name)); }

    drawStages() {
      this.stages.replaceChildren();
      this.more.replaceChildren();
      this.panels = [];
      this.frames = [];
      const alone = this.sets.length === 1;
      this.sets.forEach((name, number) => {
        const part = this.episode.parts[number];
        const stage = make("div", { class: "tdp-set", "data-set": number });
        const more = make("div", { class: "tdp-set" });
        if (this.sets.length > 1) stage.append(make("h3", {}, make("i", { class: `tdp-key tdp-line${number}` }), name));
        this.stages.append(stage);
        this.more.append(more);
        if (!part) return stage.append(make("p", { class: "tdp-faint" }, "This set has no such episode."));
        const side = make("div", { class: "tdp-side" }), now = make("div", { class: "tdp-now" });
        stage.append(now);
        if (this.view) now.append(this.frame(part, name));
        now.append(side);
        this.decisions(part, side);
        this.readings(part, side);
        this.probes(part, side);
        this.tracks("features").forEach((track, index) => {
          const first = !this.view && index === 0;
          const panel = this.features(track, part, first ? now : more);
          if (first) (panel.classList.add("tdp-first"), now.prepend(panel));
        });
        this.loose(part, more);
        this.labels(part, alone ? side : more);
        this.activations(part, alone && this.view ? side : more);
      });
      for (const node of [this.stages, this.more]) {
        node.style.setProperty("--sets", this.sets.length);
        node.style.setProperty("--few", Math.min(2, this.sets.length));
      }
      this.stages.classList.toggle("tdp-alone", alone);
      this.more.classList.toggle("tdp-alone", alone);
    }

    // A part of the page with a heading; what it returns is called at every step.
    panel(place, title, unit, update) {
      const body = make("div", {}), node = make("div", { class: "tdp-panel" }, make("h4", {}, title, unit ? make("small", {}, unit) : null), body);
      place.append(node);
      this.panels.push(update(body, node));
      return node;
    }

    // ---------------------------------------------------------------- frames

    frame(part, name) {
      const canvas = make("canvas", { role: "img", class: "tdp-frame", pointermove: (event) => point(event), pointerleave: () => (note.textContent = plain) });
      const note = make("figcaption", {});
      let plain = "";
      const map = () => {
        const track = this.attribution;
        return this.over(track) && this.heat(track, part);
      };
      const point = (event) => {
        const heat = map(), box = canvas.getBoundingClientRect();
        if (!heat || !heat.known) return;
        const row = clamp(Math.floor(((event.clientY - box.top) / box.height) * heat.height), 0, heat.height - 1);
        const column = clamp(Math.floor(((event.clientX - box.left) / box.width) * heat.width), 0, heat.width - 1);
        note.textContent = `row ${row}, column ${column}: ${heat.tell(row * heat.width + column)}`;
      };
      this.frames.push(() => {
        const heat = map(), place = this.arrays[this.view.places].row(this.at(part))[0];
        const ended = this.state.step >= part.length;
        if (place >= 0) paint(canvas, this.arrays[this.view.pictures], place, heat, this.attribution, this.state.opacity);
        canvas.classList.toggle("tdp-ended", ended || !(place >= 0));
        plain = ended ? `ended after ${part.length} steps (${part.end})` : !(place >= 0) ? "no frame at this step"
          : heat ? (heat.known ? `largest: ${heat.best}` : "the attribution was not computed at this step") : this.view.name;
        note.textContent = plain;
        canvas.setAttribute("aria-label", `Frame${name ? " of " + name : ""}, step ${Math.min(this.state.step, part.length - 1)}; ${plain}`);
      });
      return make("figure", {}, canvas, note);
    }

    // An attribution as one number for each place, with words on it.
    heat(track, part, step) {
      const [planes, height, width] = this.arrays[track.array].features;
      const values = this.values(track, part, step), size = height * width, chosen = this.state.plane;
      const flat = new Float32Array(size), from = new Uint8Array(size);
      let known = false, best = 0;
      for (let place = 0; place < size; place++) {
        for (let plane = 0; plane < planes; plane++) {
          const value = values[plane * size + place];
          if (Number.isNaN(value) || (chosen !== "" && Number(chosen) !== plane)) continue;
          known = true;
          if (Math.abs(value) > Math.abs(flat[place]) || (plane && Number(chosen) === plane)) (flat[place] = value), (from[place] = plane);
        }
        if (Math.abs(flat[place]) > Math.abs(flat[best])) best = place;
      }
      const tell = (place) => `${planes > 1 && track.planes[from[place]] ? track.planes[from[place]] + " " : ""}${short(flat[place])}`;
      return { height, width, flat, known, tell, best: known ? `${tell(best)} at row ${Math.floor(best / width)}, column ${best % width}` : "" };
    }

    drawFrames() { this.frames.forEach((draw) => draw()); }

    // ---------------------------------------------------------------- panels

    decisions(part, place) {
      for (const track of this.tracks("choice")) {
        const taken = this.tracks("chosen").find((one) => one.name === track.name);
        const unit = { probability: "probability", value: "estimated value", unknown: "taken" }[track.form];
        const ends = track.form === "value" ? this.ends(track) : [0, 1];
        this.panel(place, capital(track.name), unit, (body) => {
          const rows = track.names.map((name) => bar(body, name, ends));
          return () => {
            const values = this.values(track, part), chosen = this.values(taken, part)[0];
            rows.forEach((row, index) => row.set(track.form === "unknown" ? (index === chosen ? 1 : 0) : values[index], { taken: index === chosen, bare: track.form === "unknown" }));
          };
        });
      }
      for (const track of this.tracks("continuous")) {
        const known = this.arrays[track.array].features[1];
        const rows = track.names.map((_, index) => this.ends(track, (entry) => Math.floor(entry / known) === index));
        const banded = this.ends(track, (entry) => entry % known === 2);
        this.panel(place, "Action", banded ? "taken ●, mean |, one deviation" : "taken ●", (body) => {
          const drawn = track.names.map((name, index) => band(body, name, rows[index] || [0, 1]));
          return () => drawn.forEach((row, index) => row(this.values(track, part).subarray(known * index, known * (index + 1))));
        });
      }
    }

    // The smallest and the largest value of a track in all episodes, or of those of its entries that are chosen.
    ends(track, chosen = () => true) {
      const { low, high } = this.arrays[track.array].limits();
      const entries = [...low.keys()].filter(chosen);
      return range(entries.flatMap((entry) => [low[entry], high[entry]]));
    }

    readings(part, place) {
      const listed = [];
      for (const track of this.tracks("number", "value")) listed.push([track.name.replace("state_value", "value"), (step) => this.values(track, part, step)[0]]);
      for (const track of this.tracks("number", "reward")) {
        const sums = [];
        this.series(track, part).forEach((reward, step) => sums.push((step ? sums[step - 1] : 0) + (reward || 0)));
        listed.push(["reward", (step) => this.values(track, part, step)[0]], ["return so far", (step) => sums[Math.min(step, part.length - 1)]]);
      }
      const doubt = this.doubt();
      if (doubt) listed.push([doubt.name, (step) => doubt.of(part, step)]);
      for (const role of ["control", "steered"]) {
        for (const track of this.tracks("number", role)) listed.push([role === "steered" ? `steered ${track.name}` : track.name, (step) => this.values(track, part, step)[0]]);
      }
      if (!listed.length) return;
      this.panel(place, "Readings", "", (body, node) => {
        node.classList.add("tdp-readings");
        const cells = listed.map(([name]) => {
          const value = make("dd", {});
          body.append(make("div", {}, make("dt", {}, name), value));
          return value;
        });
        return () => listed.forEach(([, read], index) => (cells[index].textContent = short(read(this.state.step))));
      });
    }

    // How undecided the policy is: a name, and a number for each step, larger where it is more so.
    doubt() {
      const track = this.tracks("choice").find((one) => one.form !== "unknown");
      if (track && track.form === "probability") return { name: "entropy", sign: 1, of: (part, step) => entropy(this.values(track, part, step)) };
      if (track) {
        return { name: "margin", sign: -1, of: (part, step) => {
          const [first, second] = [...this.values(track, part, step)].sort((a, b) => b - a);
          return first - second;
        } };
      }
      const spread = this.tracks("continuous")[0], known = 4;
      if (!spread || !this.ends(spread, (entry) => entry % known === 2)) return null;
      return { name: "deviation", sign: 1, of: (part, step) => {
        const values = this.values(spread, part, step);
        let sum = 0;
        for (let entry = 0; entry < values.length; entry += known) sum += (values[entry + 3] - values[entry + 2]) / 2;
        return (sum * known) / values.length;
      } };
    }

    probes(part, place) {
      for (const track of this.tracks("probe")) {
        const truth = this.tracks("label").find((label) => label.name === track.name && this.arrays[label.array].entries === 1);
        const classes = this.arrays[track.array].entries, ends = this.ends(track) || [0, 1];
        const share = ends[0] >= 0 && ends[1] <= 1.0001;
        const names = Array.from({ length: classes }, (_, index) => (classes === 1 ? track.name : `${track.name} is ${index}`));
        this.panel(place, `Probe ${track.name}`, truth ? "● what it is" : share ? "probability" : "", (body) => {
          const rows = names.slice(0, 10).map((name) => bar(body, name, share ? [0, 1] : ends));
          if (classes > 10) body.append(make("p", { class: "tdp-faint" }, `and ${classes - 10} more`));
          return () => {
            const values = this.values(track, part), is = truth ? this.values(truth, part)[0] : NaN;
            rows.forEach((row, index) => row.set(values[index], { taken: index === is && classes > 1, mark: "true" }));
          };
        });
      }
    }

    features(track, part, place) {
      const all = this.attribution, explained = all && all.layout === "features" && all.source === track.name ? all : null;
      const names = track.names, most = 12;
      const spans = names.map((_, index) => this.ends(track, (entry) => entry === index) || [0, 1]);
      const unit = explained ? `value, and attribution of ${explained.name}` : "value, in its range";
      return this.panel(place, track.name, unit, (body, node) => {
        node.classList.add("tdp-features");
        const list = make("div", {}), rows = [];
        const toggle = make("button", { type: "button", "aria-expanded": "false", click: () => {
          toggle.setAttribute("aria-expanded", String(toggle.getAttribute("aria-expanded") !== "true"));
          update();
        } });
        body.append(list);
        if (names.length > most) body.append(toggle);
        const update = () => {
          const whole = toggle.getAttribute("aria-expanded") === "true";
          const values = this.values(track, part), weights = explained && this.values(explained, part);
          const order = names.map((_, index) => index);
          if (names.length > most && !whole) {
            const size = weights ? (index) => Math.abs(weights[index]) || 0 : (index) => Math.abs(values[index]) || 0;
            order.sort((a, b) => size(b) - size(a)).splice(most);
          }
          while (rows.length < order.length) rows.push(bar(list, "", [0, 1]));
          while (rows.length > order.length) rows.pop().node.remove();
          rows.forEach((row, at) => {
            const index = order[at];
            row.name(names[index], weights ? short(values[index]) : "");
            if (weights) row.set(weights[index], { ends: [explained.signed ? -explained.scale : 0, explained.scale], colour: true });
            else row.set(values[index], { ends: spans[index], range: true });
          });
          const absent = weights && weights.every(Number.isNaN);
          node.querySelector("small").textContent = absent ? "value; the attribution was not computed at this step" : unit;
          toggle.textContent = whole ? `show the largest ${most}` : `show all ${names.length}`;
        };
        return update;
      });
    }

    // An attribution that lies over nothing that is shown.
    loose(part, place) {
      const track = this.attribution;
      if (!track || this.over(track)) return;
      if (track.layout === "features" && this.tracks("features").some((one) => one.name === track.source)) return;
      if (track.layout === "features") {
        return this.panel(place, `Attribution of ${track.name}`, track.source, (body) => {
          const most = Math.min(12, track.names.length);
          const rows = Array.from({ length: most }, () => bar(body, "", [0, 1]));
          return () => {
            const values = this.values(track, part);
            const order = [...values.keys()].sort((a, b) => (Math.abs(values[b]) || 0) - (Math.abs(values[a]) || 0));
            rows.forEach((row, at) => {
              row.name(track.names[order[at]], "");
              row.set(values[order[at]], { ends: [track.signed ? -track.scale : 0, track.scale], colour: true });
            });
          };
        });
      }
      this.panel(place, `Attribution of ${track.name}`, track.source, (body) => {
        const canvas = make("canvas", { class: "tdp-frame", role: "img" });
        body.append(canvas);
        return () => {
          const heat = this.heat(track, part);
          paint(canvas, null, 0, heat, track, 1);
          canvas.setAttribute("aria-label", heat.known ? `largest: ${heat.best}` : "not computed at this step");
        };
      });
    }

    activations(part, place) {
      const sites = this.tracks("activation");
      if (!sites.length) return;
      const track = sites.find((one) => one.name === this.state.site) || sites[0];
      const rows = this.arrays[track.array], units = rows.entries, signed = (this.ends(track) || [0])[0] < 0;
      const middle = signed ? 30 : 60, tall = 61;
      this.panel(place, sites.length > 1 ? "Activations" : `Activations of ${track.name}`, track.note || `${units} units`, (body, node) => {
        node.classList.add("tdp-wide");
        const pick = choice("Site", sites.map((one) => [one.name, one.name]), (value) => this.choose({ site: value }));
        pick.select.value = track.name;
        const strip = make("canvas", { class: "tdp-strip", role: "img", width: part.length, height: units,
          "aria-label": `Activations of ${track.name}: a row for each unit, a column for each step`,
          click: (event) => this.go(Math.floor((event.offsetX / strip.clientWidth) * part.length)) });
        const cursor = make("i", { class: "tdp-cursor" }), note = make("p", { class: "tdp-faint" });
        const bars = make("canvas", { class: `tdp-units${signed ? " tdp-signed" : ""}`, width: units, height: tall, role: "img" });
        body.append(sites.length > 1 ? pick.node : "", make("div", { class: "tdp-stripbox" }, strip, cursor), bars, note);
        const context = strip.getContext("2d"), image = context.createImageData(part.length, units);
        for (let step = 0; step < part.length; step++) {
          const values = this.values(track, part, step);
          for (let unit = 0; unit < units; unit++) colour(image.data, 4 * (unit * part.length + step), values[unit], track.scale);
        }
        context.putImageData(image, 0, 0);
        return () => {
          const values = this.values(track, part), step = Math.min(this.state.step, part.length - 1);
          cursor.style.left = `${(100 * (step + 0.5)) / part.length}%`;
          const pen = bars.getContext("2d"), drawn = pen.createImageData(units, tall);
          values.forEach((value, unit) => {
            const reach = Math.round(clamp(value / track.scale, -1, 1) * middle) || 0;
            for (let y = Math.min(0, reach); y <= Math.max(0, reach); y++) colour(drawn.data, 4 * ((middle - y) * units + unit), value, Math.abs(value) || 1);
          });
          pen.putImageData(drawn, 0, 0);
          const sizes = values.map(Math.abs), best = largest([...sizes]);
          note.textContent = best < 0 ? "not computed at this step"
            : `this step: largest unit ${best} with ${short(values[best])}, ${values.filter((value) => value === 0).length} at zero; full colour: ${short(track.scale)}`;
          bars.setAttribute("aria-label", note.textContent);
        };
      });
    }

    labels(part, place) {
      const labels = this.tracks("label");
      if (!labels.length) return;
      this.panel(place, "Concepts", "", (body, node) => {
        node.classList.add("tdp-readings");
        const cells = labels.map((track) => {
          const value = make("dd", {});
          body.append(make("div", {}, make("dt", {}, track.name), value));
          return value;
        });
        return () => labels.forEach((track, index) => (cells[index].textContent = [...this.values(track, part)].map(short).join(" ")));
      });
    }

    // ---------------------------------------------------------------- the timeline

    // What has a course over the episode, with a number for each step of each set.
    courses() {
      const found = [], parts = this.episode.parts;
      const add = (name, read, options = {}) => {
        const series = parts.map((part) => part && Array.from({ length: part.length }, (_, step) => read(part, step)));
        if (series.some((one) => one && one.some(Number.isFinite))) found.push({ name, series, ...options });
      };
      for (const track of this.tracks("number", "reward").slice(0, 1)) {
        add("reward", (part, step) => this.values(track, part, step)[0], { bars: true, floor: 0 });
        let sum = 0;
        add("return", (part, step) => (sum = (step ? sum : 0) + (this.values(track, part, step)[0] || 0)));
      }
      for (const track of this.tracks("number", "value").slice(0, 2)) add(track.name.replace("state_value", "value"), (part, step) => this.values(track, part, step)[0]);
      const doubt = this.doubt();
      if (doubt) add(doubt.name, doubt.of, { floor: 0 });
      const track = this.attribution;
      if (track) add("attribution", (part, step) => this.arrays[track.size].row(this.at(part, step))[0], { floor: 0 });
      for (const probe of this.tracks("probe").slice(0, 4)) add(`probe ${probe.name}`, (part, step) => this.reading(probe, part, step), { floor: 0, top: 1 });
      for (const role of ["control", "steered"]) {
        for (const one of this.tracks("number", role).slice(0, 2)) add(one.name, (part, step) => this.values(one, part, step)[0], { floor: 0 });
      }
      return found;
    }

    // What a probe says, as one number: of two classes the probability of the second, of more the likeliest.
    reading(probe, part, step) {
      const values = this.values(probe, part, step);
      return values.length <= 2 ? values[values.length - 1] : largest([...values]) < 0 ? NaN : largest([...values]);
    }

    drawLanes() {
      const { lanes } = this, width = Math.floor(this.root.clientWidth);
      if (!width) return;
      const narrow = width < 620, left = narrow ? 8 : 126, right = narrow ? 8 : 24 + 56 * this.sets.length;
      const courses = this.courses(), length = this.length, lane = narrow ? LANE + 14 : LANE;
      const differs = Object.entries(this.episode.differs), above = 15 * differs.length;
      const height = above + courses.length * lane + AXIS;
      const x = (step) => left + ((width - left - right) * (length > 1 ? step : 0.5)) / Math.max(1, length - 1);
      this.scale = { left, right, width, x };
      const svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
      this.marks = [];
      courses.forEach((course, index) => {
        const top = above + index * lane + (narrow ? 16 : 4), bottom = above + (index + 1) * lane - 5;
        const ends = range(course.series.flatMap((one) => one || [])), low = Math.min(course.floor ?? Infinity, ends[0]);
        const high = Math.max(course.floor ?? -Infinity, course.top ?? -Infinity, ends[1], low + 1e-9);
        const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
        svg.append(make("text", { x: narrow ? left : left - 10, y: narrow ? top - 4 : bottom - 8, class: "tdp-lane", "text-anchor": narrow ? "start" : "end" }, cut(course.name, narrow ? 30 : 16)),
          make("line", { x1: left, x2: width - right, y1: bottom, y2: bottom, class: "tdp-rule" }));
        course.series.forEach((series, set) => {
          if (!series) return;
          const aside = 3 * (set - (this.sets.length - 1) / 2); // several bars of one step stand beside each other
          const path = course.bars ? ticks(series, (step) => x(step) + aside, y, clamp(0, low, high)) : curve(series, x, y);
          const gaps = course.bars ? "" : absent(series, x, bottom);
          svg.append(make("path", { d: path, class: `tdp-line tdp-line${this.sets.length > 1 ? set : 9}` }), make("path", { d: gaps, class: "tdp-gap" }));
        });
        const value = make("text", { x: narrow ? width - right : width - right + 10, y: narrow ? top - 4 : bottom - 8, class: "tdp-value", "text-anchor": narrow ? "end" : "start" });
        const dots = course.series.map((series, set) => series && make("circle", { r: 3, class: `tdp-dot tdp-line${this.sets.length > 1 ? set : 9}` }));
        svg.append(value, ...dots.filter(Boolean));
        this.marks.push((step) => {
          const known = course.series.map((series) => (series ? series[Math.min(step, series.length - 1)] : NaN));
          value.textContent = known.map(short).join(" / ");
          dots.forEach((dot, set) => {
            if (!dot) return;
            dot.style.display = Number.isFinite(known[set]) && !course.bars ? "" : "none";
            if (Number.isFinite(known[set])) (dot.setAttribute("cx", x(Math.min(step, course.series[set].length - 1))), dot.setAttribute("cy", y(known[set])));
          });
        });
      });
      const every = niceStep(length, (width - left - right) / 48);
      for (let step = 0; step < length; step += every) svg.append(make("text", { x: x(step), y: height - 5, class: "tdp-tick", "text-anchor": "middle" }, String(step)));
      const words = differs.map(([what, step], index) => {
        const flip = x(step) > width - right - 140, y = 15 * index;
        svg.append(make("line", { x1: x(step), x2: x(step), y1: y + 2, y2: height - AXIS, class: "tdp-differs", "data-differs": what }));
        return make("text", { x: x(step) + (flip ? -5 : 5), y: y + 11, class: "tdp-differs-text", "text-anchor": flip ? "end" : "start" }, `${what} first differs at step ${step}`);
      });
      svg.append(...words); // above the lines
      this.cursor = make("line", { y1: above, y2: height - AXIS + 4, class: "tdp-now-line" });
      svg.append(this.cursor);
      lanes.replaceChildren(svg);
      this.drawCursor();
    }

    drawCursor() {
      if (!this.cursor) return;
      const x = this.scale.x(this.state.step);
      this.cursor.setAttribute("x1", x);
      this.cursor.setAttribute("x2", x);
      this.marks.forEach((mark) => mark(this.state.step));
    }

    seek(event, pressed) {
      if (!pressed && !(event.buttons & 1)) return;
      const { left, right, width } = this.scale, box = this.lanes.getBoundingClientRect();
      const share = (event.clientX - box.left - left) / (width - left - right);
      this.go(Math.round(clamp(share, 0, 1) * (this.length - 1)));
    }

    // ---------------------------------------------------------------- jumps

    drawJumps() {
      const doubt = this.doubt(), track = this.attribution, parts = this.episode.parts.filter(Boolean);
      const best = (of) => largest(Array.from({ length: this.length }, (_, step) =>
        Math.max(...parts.filter((part) => step < part.length).map((part) => of(part, step)).filter(Number.isFinite))));
      this.goals = {};
      const differs = Object.values(this.episode.differs);
      if (doubt) this.goals.u = ["most uncertain", () => best((part, step) => doubt.sign * doubt.of(part, step))];
      if (track) this.goals.a = ["largest attribution", () => best((part, step) => this.arrays[track.size].row(this.at(part, step))[0])];
      if (this.tracks("probe").length) this.goals.p = ["probe changes", () => this.nextChange(parts)];
      if (differs.length) this.goals.d = ["first difference", () => Math.min(...differs)];
      const buttons = Object.entries(this.goals).map(([key, [label, find]]) =>
        make("button", { type: "button", title: `${capital(label)} (${key.toUpperCase()})`, "data-goal": key, click: () => this.jump(label, find()) }, label));
      this.jumps.replaceChildren(...(buttons.length ? [make("span", { "aria-hidden": "true" }, "Go to"), ...buttons] : []));
    }

    // The next step at which some probe says something else than one step before; after the last the first again.
    nextChange(parts) {
      const changes = new Set();
      for (const probe of this.tracks("probe")) {
        const several = this.arrays[probe.array].entries > 2;
        for (const part of parts) {
          const said = Array.from({ length: part.length }, (_, step) => this.reading(probe, part, step));
          said.forEach((one, step) => {
            if (step && (several ? one !== said[step - 1] : one > 0.5 !== said[step - 1] > 0.5) && !Number.isNaN(one)) changes.add(step);
          });
        }
      }
      const sorted = [...changes].sort((a, b) => a - b);
      return sorted.find((step) => step > this.state.step) ?? sorted[0] ?? -1;
    }

    jump(label, step) {
      if (step < 0) this.live.textContent = `${capital(label)}: there is none in this episode.`;
      else this.go(step);
    }

    // ---------------------------------------------------------------- moving

    go(step, quiet = false) {
      const { state } = this;
      state.step = clamp(Math.round(step) || 0, 0, this.length - 1);
      this.drawFrames();
      this.panels.forEach((update) => update());
      this.drawCursor();
      const ends = new Set(this.episode.parts.filter((part) => part && state.step === part.length - 1 && part.end !== "goes on").map((part) => part.end));
      this.counter.replaceChildren(`step ${state.step} of ${this.length - 1}`, make("small", {}, [...ends].join(", ")));
      const spoken = this.sentence();
      this.lanes.setAttribute("aria-valuemax", this.length - 1);
      this.lanes.setAttribute("aria-valuenow", state.step);
      this.lanes.setAttribute("aria-valuetext", spoken);
      this.stages.querySelectorAll("[data-set]").forEach((node) => {
        const part = this.episode.parts[Number(node.dataset.set)];
        node.classList.toggle("tdp-over", Boolean(part) && state.step >= part.length);
      });
      if (this.text.open) this.say();
      clearTimeout(this.speaking);
      if (!this.timer && !quiet) this.speaking = setTimeout(() => (this.live.textContent = spoken), 250);
      const address = `#${new URLSearchParams({ player: this.name, episode: state.episode, step: state.step })}`;
      this.link.setAttribute("href", address);
      if (this.touched) {
        clearTimeout(this.addressing); // browsers refuse more than some a second
        this.addressing = setTimeout(() => write(address), this.timer ? 400 : 60);
      }
    }

    // The step in one sentence.
    sentence() {
      const said = this.sets.map((name, number) => {
        const part = this.episode.parts[number];
        if (!part) return "";
        return `${name ? name + ": " : ""}${this.facts(part).slice(0, 4).map(([what, value]) => `${what} ${value}`).join(", ")}`;
      });
      return `step ${this.state.step} of ${this.length - 1}; ${said.filter(Boolean).join("; ")}`;
    }

    // All that is known of the step, as pairs of words.
    facts(part) {
      const found = [];
      if (this.state.step >= part.length) found.push(["episode", `has ended (${part.end})`]);
      for (const track of this.tracks("chosen")) {
        const source = this.tracks("choice").find((one) => one.name === track.name), index = this.values(track, part)[0];
        const weight = source.form === "unknown" ? "" : ` (${short(this.values(source, part)[index])})`;
        found.push([track.name, `${source.names[index] ?? "–"}${weight}`]);
      }
      for (const track of this.tracks("continuous")) track.names.forEach((name, index) => found.push([name, short(this.values(track, part)[4 * index])]));
      for (const track of this.tracks("number")) found.push([track.name.replace("state_value", "value"), short(this.values(track, part)[0])]);
      const doubt = this.doubt();
      if (doubt) found.push([doubt.name, short(doubt.of(part))]);
      for (const track of this.tracks("probe")) found.push([`probe ${track.name}`, [...this.values(track, part)].map(short).join(", ")]);
      const track = this.attribution;
      if (track && track.layout === "map") {
        const heat = this.heat(track, part);
        found.push([`largest attribution of ${track.name}`, heat.known ? heat.best : "not computed"]);
      } else if (track) {
        const values = this.values(track, part), order = [...values.keys()].sort((a, b) => Math.abs(values[b]) - Math.abs(values[a])).slice(0, 3);
        found.push([`largest attributions of ${track.name}`, order.map((index) => `${track.names[index]} ${short(values[index])}`).join(", ")]);
      }
      for (const one of this.tracks("features").filter((features) => features.names.length <= 24)) one.names.forEach((name, index) => found.push([name, short(this.values(one, part)[index])]));
      for (const one of this.tracks("label")) found.push([`concept ${one.name}`, [...this.values(one, part)].map(short).join(" ")]);
      return found;
    }

    say() {
      const columns = this.sets.map((_, number) => (this.episode.parts[number] ? this.facts(this.episode.parts[number]) : []));
      const names = [...new Set(columns.flatMap((facts) => facts.map(([name]) => name)))];
      const head = this.sets.length > 1 ? [make("tr", {}, make("th", { scope: "col" }, ""), ...this.sets.map((name) => make("th", { scope: "col" }, name)))] : [];
      const rows = names.map((name) => make("tr", {}, make("th", { scope: "row" }, name),
        ...columns.map((facts) => make("td", {}, (facts.find(([other]) => other === name) || ["", ""])[1]))));
      this.words.replaceChildren(make("table", {}, make("caption", {}, `Step ${this.state.step} of ${this.episode.name}`), ...head, ...rows));
    }

    toggle() {
      if (this.timer) {
        clearInterval(this.timer);
        this.timer = null;
        this.go(this.state.step);
      } else {
        this.touched = true;
        if (this.state.step >= this.length - 1) this.go(0, true);
        this.timer = setInterval(() => (this.state.step >= this.length - 1 ? this.toggle() : this.go(this.state.step + 1, true)), 1000 / this.state.speed);
      }
      this.play.replaceChildren(icon(this.timer ? "pause" : "play"));
      this.play.setAttribute("aria-label", this.timer ? "Pause" : "Play");
      this.play.title = this.timer ? "Pause (space)" : "Play (space)";
    }

    key(event) {
      if (event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey) return;
      const target = event.target, { step } = this.state;
      if (target.matches && target.matches("input, select, textarea")) return; // they have keys of their own
      const moves = { ArrowLeft: step - 1, ArrowRight: step + 1, ArrowDown: step - 1, ArrowUp: step + 1, Home: 0, End: this.length - 1, PageUp: step - 10, PageDown: step + 10 };
      const name = event.key, upright = ["ArrowUp", "ArrowDown"].includes(name);
      this.touched = true;
      if (name in moves && (!upright || target === this.lanes)) this.go(moves[name]);
      else if (name === " " && !(target.matches && target.matches("button, summary, a"))) this.toggle();
      else if (this.goals[name.toLowerCase()]) this.jump(this.goals[name.toLowerCase()][0], this.goals[name.toLowerCase()][1]());
      else return;
      event.preventDefault();
    }

    // Where a link leads, if it is to this player.
    follow(address) {
      const asked = new URLSearchParams(address.slice(1));
      if (asked.get("player") !== this.name) return false;
      this.choose({ episode: Number(asked.get("episode")) || 0, step: Number(asked.get("step")) || 0 });
      this.touched = true;
      return true;
    }
  }

  // ------------------------------------------------------------------ drawing

  // A frame, greyer the more of the attribution is laid over it.
  function paint(canvas, pictures, place, heat, track, opacity) {
    const [rows, columns] = pictures ? pictures.features : [heat.height, heat.width];
    const height = Math.max(rows, heat ? heat.height : 0), width = Math.max(columns, heat ? heat.width : 0);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d"), image = context.createImageData(width, height), shown = image.data;
    const picture = pictures && pictures.picture(place), laid = heat && heat.known ? heat.flat : null;
    const grey = opacity * 0.9;
    for (let y = 0, to = 0; y < height; y++) {
      const row = Math.floor((y * rows) / height) * columns, above = heat ? Math.floor((y * heat.height) / height) * heat.width : 0;
      for (let x = 0; x < width; x++, to += 4) {
        const from = 3 * (row + Math.floor((x * columns) / width));
        let red = picture ? picture[from] : 235, green = picture ? picture[from + 1] : 235, blue = picture ? picture[from + 2] : 235;
        if (laid) {
          const value = laid[above + Math.floor((x * heat.width) / width)], colour = value >= 0 ? UP : DOWN;
          const weight = opacity * Math.min(1, Math.abs(value) / track.scale), rest = 1 - weight, pale = grey * (60 + 0.2 * (red + green + blue));
          red = (red * (1 - grey) + pale) * rest + colour[0] * weight;
          green = (green * (1 - grey) + pale) * rest + colour[1] * weight;
          blue = (blue * (1 - grey) + pale) * rest + colour[2] * weight;
        }
        shown[to] = red;
        shown[to + 1] = green;
        shown[to + 2] = blue;
        shown[to + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
  }

  // One pixel of the colour scale; what was not computed is grey.
  function colour(data, at, value, scale) {
    const [red, green, blue] = Number.isNaN(value) ? [140, 140, 140] : value >= 0 ? UP : DOWN;
    data[at] = red;
    data[at + 1] = green;
    data[at + 2] = blue;
    data[at + 3] = Number.isNaN(value) ? 70 : 255 * clamp(Math.abs(value) / scale, 0, 1);
  }

  // A named bar with its number.
  function bar(place, label, ends) {
    const name = make("span", { class: "tdp-name" }), fill = make("i", {}), zero = make("b", {}), number = make("span", { class: "tdp-number" });
    const own = make("span", { class: "tdp-own" });
    const node = make("div", { class: "tdp-row" }, name, own, make("span", { class: "tdp-track" }, fill, zero), number);
    name.textContent = name.title = label;
    place.append(node);
    return {
      node,
      name(text, value) {
        name.textContent = name.title = text;
        own.textContent = value;
      },
      set(value, options = {}) {
        const [low, high] = options.ends || ends, span = high - low || 1, signed = low < 0 && high > 0 && !options.range;
        const zeroAt = signed ? -low / span : 0, at = clamp(((Number.isFinite(value) ? value : low) - low) / span, 0, 1);
        const [left, right] = options.range ? [clamp(at - 0.012, 0, 0.976), clamp(at + 0.012, 0.024, 1)] : [Math.min(zeroAt, at), Math.max(zeroAt, at)];
        fill.style.left = `${100 * left}%`;
        fill.style.width = `${Number.isFinite(value) ? 100 * (right - left) : 0}%`;
        fill.className = options.colour ? (value >= 0 ? "tdp-fill-up" : "tdp-fill-down") : options.taken ? "tdp-fill-taken" : "";
        zero.style.left = `${100 * zeroAt}%`;
        zero.hidden = !signed;
        node.classList.toggle("tdp-taken", Boolean(options.taken));
        number.textContent = options.bare ? (options.taken ? "taken" : "") : `${short(value)}${options.taken ? " ●" : ""}`;
        if (options.taken) number.title = options.mark || "taken";
      },
    };
  }

  // The mean and one deviation of an action, and what was taken.
  function band(place, label, ends) {
    const wide = make("i", {}), mean = make("u", {}), dot = make("b", { class: "tdp-point" }), number = make("span", { class: "tdp-number" });
    place.append(make("div", { class: "tdp-row tdp-band" }, make("span", { class: "tdp-name", title: label }, label),
      make("span", { class: "tdp-track" }, wide, mean, dot, make("em", {}, short(ends[0])), make("em", {}, short(ends[1]))), number));
    const percent = (value) => 100 * clamp((value - ends[0]) / (ends[1] - ends[0] || 1), 0, 1);
    return ([taken, centre, low, high]) => {
      dot.style.left = `${percent(taken)}%`;
      mean.hidden = !Number.isFinite(centre);
      mean.style.left = `${percent(centre)}%`;
      wide.style.left = `${percent(low)}%`;
      wide.style.width = Number.isFinite(low) ? `${percent(high) - percent(low)}%` : "0";
      number.textContent = short(taken);
    };
  }

  // A line with gaps where nothing was computed; a step between two gaps is a dot.
  function curve(series, x, y) {
    return series.map((value, step) => {
      if (!Number.isFinite(value)) return "";
      const [before, after] = [step - 1, step + 1].map((other) => Number.isFinite(series[other]));
      return `${before ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}${before || after ? "" : "h.1"}`;
    }).join("");
  }

  function ticks(series, x, y, zero) {
    return series.map((value, step) => (Number.isFinite(value) ? `M${x(step).toFixed(1)} ${y(zero).toFixed(1)}V${y(value).toFixed(1)}` : "")).join("");
  }

  // Where nothing was computed.
  function absent(series, x, bottom) {
    return series.map((value, step) => (Number.isFinite(value) ? "" : `M${x(step).toFixed(1)} ${bottom - 2}v4`)).join("");
  }

  function niceStep(length, most) {
    for (let size = 1; ; size *= 10) for (const step of [size, 2 * size, 5 * size]) if (length / step <= Math.max(2, most)) return step;
  }

  // Documents in a frame of a notebook have no address to write to.
  function write(address) {
    if (location.protocol !== "about:") history.replaceState(history.state, "", address);
  }

  // ------------------------------------------------------------------ starting

  const players = (window.tdhookPlayers ??= []);

  async function start(root) {
    root.dataset.started = "yes";
    const same = players.filter((one) => one.root.dataset.player === root.dataset.player);
    const name = root.dataset.player;
    if (same.length || document.querySelectorAll(`.tdp[data-player="${CSS.escape(name)}"]`)[0] !== root) {
      root.dataset.player = `${name}-${[...document.querySelectorAll(".tdp")].indexOf(root) + 1}`;
    }
    const told = JSON.parse(root.querySelector("script").textContent);
    if (typeof DecompressionStream === "undefined") {
      root.append(make("p", {}, "This browser cannot unpack the player's data: one of 2023 or later can."));
      return;
    }
    const bytes = await Promise.all(told.data.map(inflate));
    delete told.data;
    const player = new Player(root, told, told.arrays.map((spec, index) => new Rows(spec, bytes[index])));
    players.push(player);
    if (player.follow(location.hash)) root.scrollIntoView({ block: "start" });
    root.dataset.ready = "yes";
  }

  function startAll() {
    document.querySelectorAll(".tdp:not([data-started])").forEach(start);
  }

  if (players.length === 0 && !window.tdhookPlayersHear) {
    window.tdhookPlayersHear = true;
    addEventListener("hashchange", () => players.some((player) => player.follow(location.hash)));
    // With one player on the page its keys work wherever nothing else takes them.
    addEventListener("keydown", (event) => {
      if (players.length === 1 && event.target === document.body) players[0].key(event);
    });
  }
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", startAll);
  else startAll();
})();
