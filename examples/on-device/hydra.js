/* A user's adapter in a page: the folder of `hydra-llm bundles export --onnx`, run by onnxruntime-web.
 *
 *   const device = await Device.load("phone/", user, { ort, Tokenizer });
 *   const { chosen } = await device.choose("a question", candidates);
 *
 * `user` is the content of user.json; it stays in the page. The same as hydra_llm.device, for tasks
 * with labels (classification, rating); tests/test_device_page.py compares the scores.
 */

const BANDWIDTHS = [0.05, 0.15, 0.5]; // tasks/classification.py
const PSEUDO_COUNT = 2;
const LEAST_PROBABILITY = 1e-3;
const CHARACTERS_PER_TOKEN = 100;
const TIE = 1e-5;

export class Device {
  static async load(folder, user, { ort, Tokenizer }) {
    const get = async (name) => {
      const reply = await fetch(folder + name);
      if (!reply.ok) throw new Error(`${folder}${name}: ${reply.status}`);
      return reply;
    };
    const json = async (name) => (await get(name)).json();
    const manifest = await json("manifest.json");
    if (manifest.format !== 1) throw new Error(`format ${manifest.format} is not known here: export the bundle again`);
    if (!manifest.task.labels?.length) throw new Error("this page scores tasks with labels; take hydra_llm.device for texts");
    if (user && user.bundle !== manifest.bundle) throw new Error("user.json was exported from another bundle: export it from this one");
    const session = async (name) => {
      const graph = new Uint8Array(await (await get(name)).arrayBuffer());
      if ((await sha256(graph)) !== manifest.files[name]) throw new Error(`${name} is damaged: export it again`);
      return ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
    };
    const tokenizer = new Tokenizer(await json("tokenizer.json"), await json("tokenizer_config.json"));
    return new Device(ort, manifest, user, tokenizer, await session("encoder.onnx"), await session("scorer.onnx"));
  }

  constructor(ort, manifest, user, tokenizer, encoder, scorer) {
    Object.assign(this, { ort, manifest, tokenizer, encoder, scorer, vectors: new Map() });
    this.labels = manifest.task.labels;
    const open = manifest.task.free_history;
    this.records = (user?.records ?? []).filter((own) => !open || this.labels.includes(own.output));
    this.head = Float32Array.from(user?.heads.adapter?.numbers ?? new Array(manifest.scorer.head_numbers).fill(0));
  }

  /* The candidates [{answer, votes, greedy, llm_probability}] with scores, and the index of the pick. */
  async choose(question, candidates) {
    const places = candidates.flatMap((own, place) => (this.labels.includes(own.answer) ? [place] : []));
    if (!places.length) return { chosen: 0, scores: [] };
    const scores = await this.#scores(question, candidates);
    const known = places.map((place) => scores[this.labels.indexOf(candidates[place].answer)]);
    const gains = this.#gains(places.map((place) => candidates[place].answer), known);
    const best = Math.max(...gains);
    return { chosen: places[gains.findIndex((gain) => gain >= best - TIE)], scores: known };
  }

  async embed(text) {
    if (!this.vectors.has(text)) this.vectors.set(text, await this.#encode(text));
    return this.vectors.get(text);
  }

  async #encode(text) {
    const most = this.manifest.encoder.max_length;
    const clean = [...text].slice(0, CHARACTERS_PER_TOKEN * most).join("").replace(/\p{Surrogate}/gu, "?");
    let { ids } = this.tokenizer.encode(clean);
    if (ids.length > most) ids = [...ids.slice(0, most - 1), ids.at(-1)];
    const row = (value) => new this.ort.Tensor("int64", BigInt64Array.from(ids, (id) => BigInt(value ?? id)), [1, ids.length]);
    const inputs = { input_ids: row(), attention_mask: row(1), token_type_ids: row(0) };
    const feeds = Object.fromEntries(this.encoder.inputNames.map((name) => [name, inputs[name]]));
    const vector = (await this.encoder.run(feeds))[this.encoder.outputNames[0]].data;
    const norm = Math.hypot(...vector);
    return vector.map((value) => value / norm);
  }

  async #scores(question, candidates) {
    const { scorer, settings } = this.manifest;
    const query = await this.embed(question);
    const heard = settings.votes === false ? candidates.map((own) => ({ ...own, votes: 0, greedy: false })) : candidates;
    const columns = { ...(await this.#shares(query)), ...this.#llm(heard) };
    const missing = scorer.side_features.filter((name) => !(name in columns));
    if (missing.length) throw new Error(`this page does not compute ${missing}: take hydra_llm.device`);
    const side = Float32Array.from(this.labels.flatMap((_, i) => scorer.side_features.map((name) => columns[name][i])));
    const inputs = {
      side: new this.ort.Tensor("float32", side, [this.labels.length, scorer.side_features.length]),
      head: new this.ort.Tensor("float32", this.head, [this.head.length]),
      left: new this.ort.Tensor("float32", query, [query.length]),
      place: new this.ort.Tensor("int64", [BigInt(await this.#place(question))], [1]),
    };
    if (!scorer.by_label) throw new Error("this page scores label features; take hydra_llm.device");
    const feeds = Object.fromEntries(this.scorer.inputNames.map((name) => [name, inputs[name]]));
    return [...(await this.scorer.run(feeds))[this.scorer.outputNames[0]].data];
  }

  /* share_*, near_*: label shares of similar records, shrunk to the training users' (LabelKind.label_shares). */
  async #shares(query) {
    const { label_shares: prior, reference } = this.manifest.population;
    const similarity = [];
    for (const own of this.records) similarity.push(dot(await this.embed(own.input), query) - reference);
    const columns = {};
    for (const name of [...BANDWIDTHS, "all"]) {
      const weights = similarity.map((value) => (name === "all" ? 1 : Math.exp(value / name)));
      const sums = this.labels.map((label) => sum(weights.filter((_, i) => this.records[i].output === label)));
      const total = sum(weights) + PSEUDO_COUNT;
      const share = sums.map((value, i) => (value + PSEUDO_COUNT * prior[i]) / total);
      columns[`share_${name}`] = share.map((value) => Math.log(value + 1e-4));
      columns[`near_${name}`] = this.#near(share, 1);
    }
    return columns;
  }

  /* llm_*: what the LLM's samples, or its probabilities, say. */
  #llm(candidates) {
    const of = (name) => this.labels.map((label) => candidates.findLast((own) => own.answer === label)?.[name]);
    const [votes, told] = [of("votes").map((own) => own ?? 0), of("llm_probability")];
    const [count, greedy] = [votes.length, of("greedy").map(Number).map((own) => own || 0)];
    if (told.some((own) => own != null)) {
      const shares = told.map((own) => own ?? 0);
      const logs = shares.map((own) => Math.log(own + LEAST_PROBABILITY) + Math.log(count));
      return { llm_votes: logs, llm_greedy: greedy, llm_near: this.#near(shares, sum(shares)) };
    }
    const total = sum(votes);
    if (!total) return { llm_votes: votes, llm_greedy: greedy, llm_near: votes };
    const logs = votes.map((own) => Math.log(((own + 0.5) / (total + 0.5 * count)) * count));
    return { llm_votes: logs, llm_greedy: greedy, llm_near: this.#near(votes, total) };
  }

  #near(weights, total) {
    if (this.manifest.task.kind !== "rating") return weights;
    const values = this.labels.map(Number);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const unit = values.map((value) => (value - low) / (high - low));
    const mean = dot(weights, unit) / total;
    return unit.map((value) => -Math.abs(value - mean));
  }

  /* What decides: the score, or for ratings the expected gain under the scores' softmax. */
  #gains(answers, scores) {
    const { task, settings, scorer } = this.manifest;
    if (task.kind === "classification" || settings.select === "best") return scores;
    const highest = Math.max(...scores);
    const odds = scores.map((own) => (scorer.loss === "listwise" ? Math.exp(own - highest) : 1 / (1 + Math.exp(-own))));
    const values = this.labels.map(Number);
    const range = Math.max(...values) - Math.min(...values);
    return answers.map((one) => sum(answers.map((other, i) => (odds[i] / sum(odds)) * (1 - Math.abs(one - other) / range))));
  }

  async #place(text) {
    const name = (await sha256(new TextEncoder().encode(text))).slice(0, 16);
    return this.manifest.scorer.known_texts[name] ?? -1;
  }
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
const dot = (left, right) => sum(Array.from(left, (value, i) => value * right[i]));

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
