// A page that is opened from a folder may not start workers: search then runs in a frame instead of a thread.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html><title>search</title>";
      frame.onload = () => {
        const inner = frame.contentWindow;
        inner.postMessage = (data) => this._answer(data);
        const load = (source) => {
          const script = frame.contentDocument.createElement("script");
          script.src = source;
          script.async = false;
          frame.contentDocument.head.append(script);
          return new Promise((resolve) => { script.onload = resolve; });
        };
        inner.importScripts = (...sources) => Promise.all(sources.map(load));
        load(new URL(url, location.href).href).then(() => {
          this.inner = inner;
          this.waiting.splice(0).forEach((data) => this.postMessage(data));
        });
      };
      document.body.append(frame);
    }
    _answer(data) {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      this.onmessage?.(event);
    }
    postMessage(data) {
      if (!this.inner) { this.waiting.push(data); return; }
      this.inner.dispatchEvent(new MessageEvent("message", { data }));
    }
    terminate() {}
  };
}
