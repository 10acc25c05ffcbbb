"use strict";
(() => {
  const make = (name, text, className) => {
    const node = document.createElement(name);
    if (text !== undefined && text !== null) node.textContent = text;
    if (className) node.className = className;
    return node;
  };

  // Tables: a click on a column's name sorts by it, numbers first down, then up.
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = make("button", head.textContent);
      button.type = "button";
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const falling = column ? head.getAttribute("aria-sort") !== "descending"
          : head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const value = (row) => row.cells[column].dataset.v;
        const order = (a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
          const [m, n] = [Number(x), Number(y)];
          const less = Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n;
          return falling ? -less : less;
        };
        body.append(...[...body.rows].sort(order));
      });
    });
  }

  // What is folded is printed too.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const node of folded) node.open = true;
  });
  addEventListener("afterprint", () => { for (const node of folded) node.open = false; });

  // Questions. Those with frames stand in the page; of the others there is text, which is laid out when it is needed.
  const data = JSON.parse(document.getElementById("data").textContent);
  const list = document.querySelector("#questions .list");
  const controls = document.querySelector("#questions .controls");
  const pages = document.querySelector("#questions .pages");
  const nodes = [...list.children];
  const kinds = { 1: "right", 0: "wrong", p: "partly", e: "failed", "-": "none" };
  const words = { 1: "right", 0: "wrong", p: "partly right", e: "failed to run", "-": "not asked" };
  const option = (n) => `(${n < 26 ? "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[n] : n + 1})`;
  const right = (q) => [...q.m].filter((m) => m === "1").length;
  const asked = (q) => [...q.m].filter((m) => m !== "-").length;
  const isolated = (text) => { const node = make("bdi", text); node.dir = "auto"; return node; };

  const answerItem = (q, arm) => {
    const item = make("li"), mark = q.m[arm];
    item.append(make("span", arm + 1, "mark"), isolated(data.arms[arm]), ": ");
    item.append(make("b", words[mark], { 1: "good", p: "good", 0: "bad" }[mark] || "none"));
    if (mark === "p") item.append(` ${q.s[arm].toFixed(2)}`);
    if (q.p[arm] !== null) item.append(` ${option(q.p[arm])}`);
    else if (q.o.length && mark === "0") item.append(", no option named:");
    const said = make("small", data.texts[q.t[arm]]);
    said.dir = "auto";
    item.append(" ", said);
    return item;
  };

  const layOut = (q) => {
    const node = make("details", null, "q"), head = make("summary"), body = make("div", null, "body");
    const squares = make("span", null, "marks");
    [...q.m].forEach((mark, arm) => {
      const square = make("i", null, kinds[mark]);
      square.title = `${data.arms[arm]}: ${words[mark]}`;
      squares.append(square);
    });
    head.append(isolated(q.q || q.i), " ", squares, " ", make("small", `${right(q)} of ${asked(q)} right`));
    const about = make("p", null, "id");
    about.append(isolated(q.i), " · ", isolated(data.videos[q.v]));
    for (const l of q.l) about.append(` · ${data.labels[l][0]}: `, isolated(data.labels[l][1]));
    body.append(about);
    if (q.o.length) {
      const options = make("ul", null, "options");
      q.o.forEach((text, n) => {
        const item = make("li", null, n === q.a ? "true" : "");
        item.append(`${option(n)} `, isolated(text), n === q.a ? " ✓" : "");
        options.append(item);
      });
      body.append(options);
      if (q.a === null) body.append(make("p", "None of the options is right.", "note"));
    } else if (q.a !== null) body.append(make("p", `Right: ${option(q.a)}`));
    if (q.r.length) body.append(make("p", `Right: ${q.r.join("; ")}`));
    const answers = make("ul", null, "answers");
    [...q.m].forEach((mark, arm) => { if (mark !== "-") answers.append(answerItem(q, arm)); });
    body.append(answers);
    node.append(head, body);
    return node;
  };

  // --- filters
  const labelled = (text, field, check) => {
    const label = make("label", null, check ? "check" : "");
    label.append(...(check ? [field, text] : [text, field]));
    controls.append(label);
    return field;
  };
  const choice = (text, items) => {
    const field = make("select");
    for (const [value, name] of items) field.append(new Option(name, value));
    return labelled(text, field);
  };
  const box = (text) => {
    const field = make("input");
    field.type = "checkbox";
    return labelled(text, field, true);
  };
  const arms = [["", "any arm"], ...data.arms.map((name, n) => [n, `${n + 1} ${name}`])];
  const search = make("input");
  search.type = "search";
  search.placeholder = "text, id or video";
  labelled("search", search);
  const wins = choice("right", arms), loses = choice("and wrong", arms);
  const labels = data.labels.map((label, n) => [n, `${label[0]}: ${label[1]}`]);
  labels.sort((a, b) => a[1].localeCompare(b[1]));
  const label = choice("category", [["", "any"], ...labels]);
  if (!labels.length) label.parentNode.hidden = true;
  const divided = box("not unanimous"), none = box("all wrong"), failed = box("failed to run");
  const framed = box("with frames");
  const sizes = choice("a page", [[10, "10"], [50, "50"], [200, "200"]]);

  const found = () => {
    const text = search.value.trim().toLowerCase();
    return data.questions.map((q, n) => n).filter((n) => {
      const q = data.questions[n];
      if (wins.value !== "" && q.m[wins.value] !== "1") return false;
      if (loses.value !== "" && !"0pe".includes(q.m[loses.value])) return false;
      if (label.value !== "" && !q.l.includes(Number(label.value))) return false;
      if (divided.checked && (right(q) === 0 || right(q) === asked(q))) return false;
      if (none.checked && (right(q) > 0 || q.m.includes("p"))) return false;
      if (failed.checked && !q.m.includes("e")) return false;
      if (framed.checked && n >= data.detailed) return false;
      if (!text) return true;
      const parts = [q.i, q.q, data.videos[q.v], ...q.o, ...q.r, ...q.t.map((t) => data.texts[t])];
      return parts.some((part) => part.toLowerCase().includes(text));
    });
  };

  let first = 0;
  const back = make("button", "← before"), on = make("button", "next →"), told = make("span");
  back.type = on.type = "button";
  pages.append(back, told, on);
  const show = () => {
    const numbers = found(), size = Number(sizes.value);
    first = Math.max(0, Math.min(first, Math.floor((numbers.length - 1) / size) * size));
    const shown = numbers.slice(first, first + size);
    list.replaceChildren(...shown.map((n) => (nodes[n] = nodes[n] || layOut(data.questions[n]))));
    const count = numbers.length.toLocaleString("en");
    told.textContent = numbers.length ? `${first + 1}–${first + shown.length} of ${count}` : "no question fits";
    back.disabled = first === 0;
    on.disabled = first + size >= numbers.length;
  };
  const restart = () => { first = 0; show(); };
  controls.addEventListener("input", restart);
  back.addEventListener("click", () => { first -= Number(sizes.value); show(); });
  on.addEventListener("click", () => { first += Number(sizes.value); show(); });
  controls.hidden = pages.hidden = false;
  show();
})();
