// Asks one question twice, with CROP and with the method off, one request after the other.

/** Fills the two answers. */
export class Asking {
  constructor(server, pruning, box, answers, planView) {
    Object.assign(this, { server, pruning, box, answers, planView });
  }

  /** say(words) tells how far it is; throws what the server refuses, or an AbortError. */
  async ask(model, picture, question, longest, signal, say) {
    const [pruned, full] = this.answers;
    for (const answer of this.answers) answer.clear();
    const crop = { ...this.pruning.value, ...(this.box.value && { regions: [this.box.value] }) };
    const body = (settings) => requestBody(model, picture, question, longest, settings);
    await this.#fill(pruned, body(crop), signal, (facts) => this.planView.foundBy(facts));
    say("Asking without CROP…");
    await this.#fill(full, body({ method: "off" }), signal, () => {});
    say(`Answered. With CROP: “${pruned.text}”. Without: “${full.text}”.`);
  }

  async #fill(answer, body, signal, onFacts) {
    answer.begin();
    try {
      answer.finish(body.crop, await this.server.chat(body, signal, onFacts, (text) => answer.add(text)));
    } catch (failure) {
      answer.abandon();
      throw failure;
    }
  }
}

function requestBody(model, picture, question, longest, crop) {
  const content = [
    { type: "image_url", image_url: { url: picture.dataUrl } },
    { type: "text", text: question },
  ];
  return {
    model,
    messages: [{ role: "user", content }],
    max_tokens: longest,
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
    // Another one each time, so that no prefix cache makes one of the two times shorter.
    cache_salt: [...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(36)).join("-"),
    crop,
  };
}
