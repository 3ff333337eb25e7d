"use strict";
(() => {
  const source = document.getElementById("data");
  if (!source) return;
  const { columns, signs, rows } = JSON.parse(source.textContent);
  const PAGE = 50;
  const at = (id) => document.getElementById(id);
  const why = columns.findIndex(([key]) => key === "why");
  const main = columns.map((column, place) => [column, place]).filter(([column]) => column[3]);
  const head = document.querySelector("#facts thead tr");
  const body = document.querySelector("#facts tbody");
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  const texts = []; // of each row all its texts in lower case, made when first searched
  let found = rows.map((_, place) => place);
  let first = 0;

  const number = (value) =>
    Math.abs(value) >= 1000
      ? Math.round(value).toLocaleString("en-US")
      : String(Number(value.toPrecision(4)));
  const shown = (value, kind) => {
    if (value === null) return "";
    if (kind === "rate") return `${(100 * value).toFixed(0)} %`;
    return kind === "number" ? number(value) : String(value);
  };
  const make = (name, text, kind) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };

  const text = (place) => {
    if (texts[place] === undefined) {
      texts[place] = rows[place].filter((value) => value !== null).join("\n").toLowerCase();
    }
    return texts[place];
  };

  const details = (row) => {
    const line = make("tr", undefined, "more");
    const cell = make("td");
    cell.colSpan = main.length;
    const list = make("dl");
    columns.forEach(([, label, kind], place) => {
      if (row[place] === null || row[place] === "") return;
      const pair = make("div");
      pair.append(make("dt", label), make("dd", shown(row[place], kind)));
      list.append(pair);
    });
    cell.append(list);
    line.append(cell);
    return line;
  };

  const line = (row) => {
    const element = make("tr", undefined, row[0].replace(" ", "-"));
    for (const [[, label, kind], place] of main) {
      const cell = make("td", undefined, kind);
      cell.dataset.label = label;
      if (place === 0) {
        const button = make("button");
        button.type = "button";
        button.setAttribute("aria-expanded", "false");
        button.title = "all that is known of this fact";
        const sign = make("span", signs[row[0]], "sign");
        sign.setAttribute("aria-hidden", "true");
        button.append(sign, ` ${row[0]}`);
        button.addEventListener("click", () => {
          const open = button.getAttribute("aria-expanded") === "true";
          button.setAttribute("aria-expanded", String(!open));
          if (open) element.nextSibling.remove();
          else element.after(details(row));
        });
        cell.append(button);
      } else {
        cell.textContent = shown(row[place], kind);
      }
      element.append(cell);
    }
    return element;
  };

  const show = () => {
    body.replaceChildren(...found.slice(first, first + PAGE).map((place) => line(rows[place])));
    const last = Math.min(first + PAGE, found.length);
    const of = found.length === rows.length ? "" : ` (of ${rows.length.toLocaleString("en-US")})`;
    at("where").textContent = found.length
      ? `${(first + 1).toLocaleString("en-US")} – ${last.toLocaleString("en-US")} of ${found.length.toLocaleString("en-US")}${of}`
      : "no fact fits";
    at("earlier").disabled = first === 0;
    at("later").disabled = last >= found.length;
    const order = at("order").value;
    for (const cell of head.children) {
      const sorted = cell.dataset.column === order;
      cell.setAttribute("aria-sort", sorted ? (at("down").checked ? "descending" : "ascending") : "none");
    }
  };

  const compare = (column, down) => (a, b) => {
    const x = rows[a][column];
    const y = rows[b][column];
    if (x === y) return a - b;
    if (x === null || x === "") return 1; // what is not known stands last, either way
    if (y === null || y === "") return -1;
    const sign = typeof x === "number" && typeof y === "number" ? x - y : collator.compare(x, y);
    return (down ? -sign : sign) || a - b;
  };

  const select = () => {
    const wanted = at("find").value.trim().toLowerCase();
    const outcome = at("outcome").value;
    const reason = at("why") ? at("why").value : "";
    found = [];
    rows.forEach((row, place) => {
      if (outcome && row[0] !== outcome) return;
      if (reason && !String(row[why]).split("; ").includes(reason)) return;
      if (wanted && !text(place).includes(wanted)) return;
      found.push(place);
    });
    const column = Number(at("order").value);
    if (column >= 0) found.sort(compare(column, at("down").checked));
    first = 0;
    show();
  };

  for (const cell of [...head.children]) {
    const button = make("button", cell.textContent);
    button.type = "button";
    button.addEventListener("click", () => {
      const same = at("order").value === cell.dataset.column;
      at("down").checked = same && !at("down").checked;
      at("order").value = cell.dataset.column;
      select();
    });
    cell.replaceChildren(button);
  }
  const move = (by) => () => {
    first += by;
    show();
    at("all").scrollIntoView();
  };
  at("earlier").addEventListener("click", move(-PAGE));
  at("later").addEventListener("click", move(PAGE));
  at("controls").addEventListener("input", select);
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  at("controls").hidden = false;
  at("pager").hidden = rows.length <= PAGE;
  if (at("static")) at("static").remove();
  select();
})();
