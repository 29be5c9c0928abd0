// Runs page.js without a browser: node page_harness.js PAGE_JS < replies.json
//
// replies: by URL [status, body] for `fetch`. The elements are those that the page asks for by id; each keeps what the
// page sets. Prints the requests that were made, and the elements, after the page's start and one sent form.
"use strict";

const fs = require("fs");
const vm = require("vm");

class Element {
  constructor(name) {
    Object.assign(this, { name, children: [], attributes: {}, listeners: {}, style: {}, classes: new Set(), value: "", textContent: "" });
    this.classList = { toggle: (one, on) => (on ? this.classes.add(one) : this.classes.delete(one)) };
  }
  get options() { return this.children; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) {
    this.children = children;
    if (this.name === "model") this.value = children[0].value;
  }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener(event, listener) { this.listeners[event] = listener; }
  toJSON() {
    const { children, attributes, style, value, textContent, className, title } = this;
    return { children, attributes, style, value, textContent, className, title, classes: [...this.classes] };
  }
}

const replies = JSON.parse(fs.readFileSync(0, "utf-8"));
const elements = {};
const requests = [];
const intervals = [];
const element = (id) => (elements[id] ??= new Element(id));
element("texts").value = "a cat\n\n  \na dog";
element("key").value = "secret";

const page = vm.createContext({
  document: {
    getElementById: element,
    createElement: (name) => new Element(name),
    createElementNS: (_, name) => new Element(name),
  },
  Option: class extends Element {
    constructor(text, value) { super("option"); Object.assign(this, { textContent: text, value }); }
  },
  fetch: async (url, options) => {
    requests.push({ url, ...options });
    const [status, body] = replies[url];
    return { ok: status < 300, status, json: async () => body };
  },
  setInterval: (function_, ms) => intervals.push(ms),
  location: { hash: "" },
  performance,
});

(async () => {
  vm.runInContext(fs.readFileSync(process.argv[2], "utf-8"), page);
  await new Promise((resolve) => setTimeout(resolve, 0));
  const started = JSON.parse(JSON.stringify(elements));
  if (elements.try.listeners.submit) await elements.try.listeners.submit({ preventDefault() {} });
  const described = vm.runInContext('["scores", "tokens"].map((kind) => describe(kind, ["a"], [[1]]))', page);
  console.log(JSON.stringify({ requests, intervals, started, sent: elements, described }));
})();
