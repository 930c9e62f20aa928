// What the API says, drawn. Text from etcd only ever becomes textContent, an attribute or part of a "#" link.

// A kind's letter in the map, and what it is.
const KINDS = {
  endpoint: ["E", "a container"],
  host: ["H", "a Docker host itself"],
  router: ["G", "a gateway, or an auxiliary address"],
  reserved: ["R", "kept by an operator"],
  conflict: ["!", "a stranger has it"],
  standby: ["S", "tested, for the next container"],
  held: ["=", "its container is stopped"],
  unreadable: ["?", "a value that cannot be read; taken"],
  excluded: ["×", "never given out"],
  free: ["", ""],
  unusable: ["–", "network or broadcast address"],
};
const SECOND = 1000;
const SEARCH_AGAIN = 2 * SECOND;

const main = document.getElementById("main");
const query = document.getElementById("query");
const banner = document.getElementById("banner");
const lamp = document.getElementById("state");

let route = { name: "", parts: [] };
let drawn = ""; // the map that is on the screen
let state = null; // what /api/state said last
let heard = Date.now(); // when
let busy = false;
let again = false;
let searched = 0;
let shown = -1; // the revision of what is on the screen
let peeked = "";

// ------------------------------------------------------------------------------------------- elements

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((each) => each !== null && each !== undefined && each !== false && each !== ""));
  return element;
}

const link = (...parts) => "#/" + parts.map(encodeURIComponent).join("/");
const number = (count) => (count >= Number.MAX_SAFE_INTEGER ? "very many" : count.toLocaleString("en"));
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const known = (kind) => (Object.hasOwn(KINDS, kind) ? KINDS[kind] : KINDS.unreadable);

function sign(kind) {
  return h("span", { class: "sign", "data-kind": kind, "aria-hidden": "true" }, known(kind)[0]);
}

function when(text) {
  const moment = new Date(text);
  if (!text || Number.isNaN(moment.getTime())) return text || "";
  const shown = moment.toLocaleString("en-GB", { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" });
  return `${shown} (${ago(moment)})`;
}

const day = (text) => when(text).replace(/ \([^(]*\)$/, "");

function ago(moment) {
  const seconds = (Date.now() - moment.getTime()) / SECOND;
  const size = Math.abs(seconds);
  const [count, unit] = size < 90 ? [size, "s"] : size < 5400 ? [size / 60, "min"] : size < 129600 ? [size / 3600, "h"] : [size / 86400, "d"];
  return seconds >= 0 ? `${Math.round(count)} ${unit} ago` : `in ${Math.round(count)} ${unit}`;
}

// The program's sentences have times as they stand in etcd.
const spoken = (text) => (text || "").replace(/\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z/g, (time) => when(time));

function bar(use) {
  const parts = Object.keys(KINDS)
    .filter((kind) => use.kinds[kind])
    .map((kind) => {
      const part = h("i", { "data-kind": kind, title: `${number(use.kinds[kind])} ${kind}` });
      part.style.width = `${(100 * use.kinds[kind]) / use.size}%`;
      return part;
    });
  return h("div", { class: "bar", "aria-hidden": "true" }, parts);
}

const taken = (use) => Object.values(use.kinds).reduce((sum, count) => sum + count, 0);
const fullness = (use) => (use.size >= Number.MAX_SAFE_INTEGER ? number(taken(use)) : percent(use));

function percent(use) {
  const full = (100 * (use.size - use.free)) / Math.max(1, use.size);
  return full > 0 && full < 1 ? "<1 %" : full > 99 && use.free ? ">99 %" : `${Math.round(full)} %`;
}

function counts(use) {
  return Object.keys(KINDS)
    .filter((kind) => use.kinds[kind])
    .map((kind) => h("span", {}, sign(kind), `${number(use.kinds[kind])} ${kind}`));
}

function legend(use) {
  const kinds = Object.keys(KINDS).filter((kind) => use.kinds[kind] || kind === "free");
  return h(
    "ul",
    { class: "legend", "aria-label": "Legend" },
    kinds.map((kind) => h("li", { title: known(kind)[1] }, sign(kind), h("span", {}, h("b", { class: "tabular" }, number(kind === "free" ? use.free : use.kinds[kind])), " ", kind, h("span", { class: "quiet" }, known(kind)[1] && ` – ${known(kind)[1]}`)))),
  );
}

// Put new children in place; whoever uses a keyboard stays where they were.
function draw(container, ...children) {
  const focused = document.activeElement && container.contains(document.activeElement) ? document.activeElement.dataset.key : "";
  const scrolled = container.querySelector(".detail")?.scrollTop;
  container.replaceChildren(...children.flat().filter(Boolean));
  if (focused) container.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  if (scrolled) container.querySelector(".detail")?.scrollTo(0, scrolled);
}

// ------------------------------------------------------------------------------------------- the pages

function overview(told) {
  const alarms = told.hosts.flatMap((host) => (host.alarms || []).map((alarm) => h("li", {}, h("strong", {}, "Alarm"), " on ", h("b", {}, host.name), ": ", spoken(alarm))));
  for (const segment of told.segments)
    if (segment.error) alarms.push(h("li", {}, h("strong", {}, "Nothing is given out"), " in segment ", h("b", {}, segment.name), ", its settings cannot be read: ", segment.error));
  if (told.strays.length)
    alarms.push(h("li", {}, h("strong", {}, "Keys that take nothing"), ", because they name no address or pool: ", h("span", { class: "mono" }, told.strays.join(", ")), more(told.more.strays)));
  draw(
    main,
    alarms.length ? h("section", { "aria-label": "Alarms" }, h("h2", {}, "Alarms"), h("ul", { class: "alarms" }, alarms)) : null,
    told.segments.map((segment) =>
      h(
        "section",
        { "aria-label": `Segment ${segment.name}` },
        h(
          "div",
          { class: "head" },
          h("h2", {}, "Segment ", segment.name),
          segment.note ? h("span", {}, segment.note) : null,
          (segment.routers || []).length ? h("span", { class: "quiet" }, "router ", h("span", { class: "mono" }, segment.routers.join(", "))) : null,
        ),
        h("div", { class: "subnets" }, segment.subnets.map((line) => subnet_card(segment, line))),
        more(segment.more),
        segment.subnets.length ? null : h("p", { class: "quiet" }, "No network and no lease yet."),
      ),
    ),
    told.segments.length ? null : h("section", {}, h("h1", {}, "The register is empty"), h("p", { class: "quiet" }, "No Docker network uses the driver yet, and nothing is reserved.")),
    more(told.more.segments),
    told.conflicts.length ? h("section", { "aria-label": "Conflicts" }, h("h2", {}, "Conflicts"), spots(told.conflicts), more(told.more.conflicts)) : null,
    told.hosts.length ? hosts(told.hosts, told.more.hosts) : null,
  );
  document.title = "ipam-plugin";
}

function subnet_card(segment, line) {
  const where = line.pools.length ? [...new Set(line.pools.flatMap((pool) => pool.hosts))].join(", ") : "outside every network";
  return h(
    "a",
    { class: "card subnet", href: link("map", segment.name, line.subnet), "data-key": `subnet ${segment.name} ${line.subnet}` },
    h("div", { class: "head" }, h("span", { class: "name mono" }, line.subnet), h("span", { class: "tabular" }, h("b", {}, fullness(line.use)), " taken")),
    bar(line.use),
    h("div", { class: "counts tabular" }, h("span", {}, sign("free"), h("b", {}, number(line.use.free)), "free"), counts(line.use)),
    h("div", { class: "quiet" }, where),
  );
}

function hosts(lines, beyond) {
  return h(
    "section",
    { "aria-label": "Hosts" },
    h("h2", {}, "Hosts"),
    h(
      "div",
      { class: "card" },
      h(
        "table",
        { class: "hosts" },
        h("thead", {}, h("tr", {}, ["Host", "Heartbeat", "Leases", "Own addresses", "Version"].map((each) => h("th", { scope: "col" }, each)))),
        h(
          "tbody",
          {},
          lines.map((host) =>
            h(
              "tr",
              {},
              h("td", {}, h("a", { href: link("search", host.name), "data-key": `host ${host.name}` }, host.name)),
              h("td", {}, heartbeat(host)),
              h("td", { class: "tabular", "data-name": "leases" }, number(host.leases)),
              h("td", { class: "mono" }, (host.addresses || []).map((each) => `${each.address}/${each.prefixlen} ${each.interface}`).join(", ")),
              h("td", { "data-name": "version" }, host.version || ""),
            ),
          ),
        ),
      ),
      more(beyond),
    ),
  );
}

function heartbeat(host) {
  const said = host.alive ? ["beats", host.since ? `, since ${when(host.since)}` : ""] : ["none", host.absent ? `, since ${when(host.absent)}` : ""];
  return h("span", {}, h("span", { class: host.alive ? "beat" : "beat gone" }, said[0]), said[1], host.retiring ? " – is being retired" : "");
}

const more = (count) => (count ? h("p", { class: "quiet" }, `and ${number(count)} more`) : null);

function spots(list) {
  return h(
    "ul",
    { class: "hits card" },
    list.map((spot) =>
      h(
        "li",
        {},
        h(
          "a",
          { href: link("address", spot.segment, spot.address), "data-key": `spot ${spot.segment} ${spot.address}` },
          sign(spot.kind),
          h("span", { class: "mono" }, spot.address),
          h("span", { class: "told" }, spot.past ? h("i", {}, "had it before; now ") : "", spoken(spot.told) || spot.kind),
          h("span", { class: "quiet" }, spot.segment),
        ),
      ),
    ),
  );
}

function results(told) {
  draw(
    main,
    h("section", {}, h("div", { class: "head" }, h("h1", {}, "Search: ", told.query), h("span", { class: "quiet", role: "status" }, plural(told.spots.length + told.hosts.length + told.more, "result")))),
    told.hosts.length ? hosts(told.hosts) : null,
    told.spots.length ? h("section", { "aria-label": "Addresses" }, h("h2", {}, "Addresses"), spots(told.spots), more(told.more)) : null,
    told.spots.length + told.hosts.length ? null : h("p", { class: "quiet" }, "Nothing in the register has this in its address, MAC, container, image, network, host or note."),
  );
  document.title = `${told.query} – ipam-plugin`;
}

function row(name, value, kind = "") {
  return value ? [h("dt", {}, name), h("dd", { class: kind }, value)] : [];
}

function detail(told, close) {
  const container = told.container || {};
  return h(
    "article",
    { class: "card detail", "aria-label": `Address ${told.address}` },
    h(
      "div",
      { class: "head" },
      h("h1", { class: "mono" }, told.address),
      close
        ? h("button", { class: "close", type: "button", onclick: close, "data-key": "close", "aria-label": "Close" }, "✕")
        : h("a", { href: link("map", told.segment, told.map, told.address), "data-key": "on the map" }, "on the map"),
    ),
    h("p", { class: "told" }, sign(told.kind), " ", h("b", {}, told.kind), told.told ? ": " : "", spoken(told.told)),
    (told.reasons || []).length ? h("div", {}, h("h3", {}, "Why it is not given"), h("ul", {}, told.reasons.map((each) => h("li", {}, spoken(each))))) : null,
    h(
      "dl",
      {},
      row("Container", container.name),
      row("Image", container.image),
      row("Network", container.network),
      row("ID", (container.id || "").slice(0, 12), "mono"),
      row("Host", told.host ? h("a", { href: link("search", told.host), "data-key": "host" }, told.host) : ""),
      row("MAC", told.mac ? h("a", { class: "mono", href: link("search", told.mac), "data-key": "mac" }, told.mac) : ""),
      row("Maker", told.vendor),
      row("Interface", told.interface),
      row("Since", when(told.since)),
      row("Until", when(told.until)),
      row("Note", told.note),
      row("By", told.by),
      (told.holders || []).flatMap((each) => row("Used by", `${each.host}, ${each.pool}`)),
      row("Pool", told.pool, "mono"),
      row("Segment", told.segment),
      row("etcd key", told.key, "mono"),
    ),
    h("h3", {}, "History"),
    (told.past || []).length
      ? h(
          "ol",
          { class: "past" },
          told.past.map((each) =>
            h(
              "li",
              { "data-kind": each.kind },
              h("b", {}, each.kind),
              each.container && each.container.name ? ` ${each.container.name}` : "",
              each.host ? ` on ${each.host}` : "",
              each.mac ? h("span", { class: "mono" }, ` ${each.mac}`) : "",
              h("span", { class: "quiet" }, [each.since ? `${day(each.since)} – ` : "until ", when(each.until)].join("")),
              each.why ? h("span", { class: "quiet" }, each.why) : "",
            ),
          ),
        )
      : h("p", { class: "quiet" }, "Nobody had it before, as far as is remembered."),
  );
}

// ------------------------------------------------------------------------------------------- the map

// The end of an address that tells it from its neighbours.
function tail(address, subnet) {
  if (address.includes(":")) return address.replace(/^.*?((:[0-9a-f]*){1,2})$/, "$1");
  const parts = address.split(".");
  const length = Number(subnet.split("/")[1]);
  return length >= 24 ? parts[3] : length >= 16 ? parts.slice(2).join(".") : parts.slice(1).join(".");
}

function block_label(block, whole) {
  if (block.includes(":")) return block;
  const [from, to] = [whole, block].map((each) => Number(each.split("/")[1]));
  return block.split("/")[0].split(".").slice(Math.floor(from / 8), Math.ceil(to / 8)).join(".") || block;
}

const narrow = matchMedia("(max-width: 40rem)");
const small = matchMedia("(max-width: 60rem)"); // as in page.css

function columns_of(told) {
  if (told.blocks && told.blocks.length) return told.sparse ? (narrow.matches ? 2 : 4) : narrow.matches ? 6 : 16;
  const many = (told.cells || []).length > 256;
  return narrow.matches ? 8 : many ? 32 : 16;
}

function map_page(told, chosen) {
  const cells = told.cells || [];
  const blocks = told.blocks || [];
  const columns = columns_of(told);
  const key = ["map", told.segment, told.subnet, columns, cells.length, blocks.length, told.sparse && cells.map((each) => each.address)].join(" ");
  if (drawn === key) {
    update_map(told);
  } else {
    drawn = key;
    const grid = blocks.length
      ? block_grid(told, blocks, columns)
      : told.sparse
        ? h("div", { class: "listed", role: "grid", "aria-label": `Taken addresses of ${told.subnet}` }, cells.map((each) => h("div", { role: "row" }, cell_button(each, each.address))))
        : cell_grid(told, cells, columns);
    draw(
      main,
      h(
        "section",
        {},
        h(
          "ul",
          { class: "crumbs", "aria-label": "Where this map lies" },
          h("li", {}, h("a", { href: "#/" }, "All segments")),
          h("li", {}, "Segment ", told.segment),
          told.within.map((each) => h("li", {}, h("a", { class: "mono", href: link("map", told.segment, each) }, each))),
        ),
        h("div", { class: "head" }, h("h1", { class: "mono" }, told.subnet), h("span", { id: "full", class: "tabular" })),
        h("div", { id: "legend" }),
      ),
      h("div", { class: "place", id: "place" }, h("div", { class: "card" }, grid, blocks.length ? null : h("p", { class: "peek quiet", id: "peek" }, "Arrow keys move, Enter opens an address.")), h("div", { id: "detail", hidden: true })),
      pools(told),
    );
    update_map(told);
  }
  for (const cell of main.querySelectorAll(".cell")) cell.setAttribute("aria-selected", String(cell.dataset.address === chosen));
  document.title = `${told.subnet} – ipam-plugin`;
}

function pools(told) {
  if (!told.pools.length) return null;
  return h(
    "section",
    { "aria-label": "Networks" },
    h("h2", {}, "Networks"),
    h(
      "ul",
      { class: "card" },
      told.pools.map((pool) => {
        const options = Object.entries(pool.options || {}).map(([name, value]) => `${name}=${value}`);
        return h("li", {}, h("span", { class: pool.range ? "mono" : "" }, pool.range || "the whole subnet"), " on ", pool.hosts.join(", "), options.length ? h("span", { class: "quiet" }, ` (${options.join(", ")})`) : "");
      }),
    ),
  );
}

// Without `label` the rows have none, because each item says where it is.
function grid_of(told, items, columns, label, item) {
  const rows = [];
  for (let first = 0; first < items.length; first += columns) {
    const slice = items.slice(first, first + columns);
    const end = slice.length < columns ? Array.from({ length: columns - slice.length }, () => h("span", {})) : [];
    rows.push(h("div", { role: "row" }, label && h("span", { class: "label tabular mono", role: "rowheader" }, label(slice[0])), slice.map(item), end));
  }
  const grid = h("div", { class: label ? (items.length > 256 ? "map dense" : "map") : "map blocks", role: "grid", "aria-label": `Map of ${told.subnet}` }, rows);
  grid.style.setProperty("--columns", columns);
  return grid;
}

function cell_grid(told, cells, columns) {
  return grid_of(told, cells, columns, (cell) => tail(cell.address, told.subnet), (cell) => cell_button(cell, tail(cell.address, `${told.subnet.split("/")[0]}/24`)));
}

function cell_button(cell, text) {
  const letter = h("span", {});
  const button = h("button", { class: "cell", type: "button", role: "gridcell", tabindex: -1, "data-address": cell.address, "data-key": cell.address }, h("small", {}, text), letter);
  return button;
}

function block_grid(told, blocks, columns) {
  const item = (block) =>
    h("a", { class: "block", role: "gridcell", tabindex: -1, "data-block": block.subnet, "data-key": block.subnet, href: link("map", told.segment, block.subnet) }, h("div", { class: "top" }));
  return grid_of(told, blocks, columns, null, item);
}

function update_map(told) {
  const find = (name, value) => main.querySelector(`[data-${name}="${CSS.escape(value)}"]`);
  for (const cell of told.cells || []) {
    const button = find("address", cell.address);
    const said = cell.told ? `${cell.kind}: ${spoken(cell.told)}` : cell.kind;
    if (button.dataset.kind === cell.kind && button.dataset.said === said) continue;
    const fresh = !button.dataset.kind;
    button.dataset.kind = cell.kind;
    button.dataset.said = said;
    button.title = `${cell.address} – ${said}`;
    button.setAttribute("aria-label", `${cell.address}, ${said}`);
    button.lastChild.textContent = known(cell.kind)[0];
    if (!fresh) flash(button);
  }
  for (const block of told.blocks || []) {
    const tile = find("block", block.subnet);
    const text = JSON.stringify(block.use);
    if (tile.dataset.use === text) continue;
    const fresh = !tile.dataset.use;
    tile.dataset.use = text;
    tile.style.setProperty("--full", (block.use.size - block.use.free) / block.use.size);
    const conflicts = block.use.kinds.conflict || 0;
    const full = told.sparse ? number(taken(block.use)) : percent(block.use);
    const said = `${block.subnet}, ${full} taken, ${number(block.use.free)} free${conflicts ? `, ${plural(conflicts, "conflict")}` : ""}`;
    tile.title = said;
    tile.setAttribute("aria-label", said);
    tile.replaceChildren(
      h("div", { class: "top" }, h("b", {}, block_label(block.subnet, told.subnet), conflicts ? h("span", { class: "warn" }, "!") : ""), h("span", { class: "full" }, full.replace(" %", "%"))),
      bar(block.use),
    );
    if (!fresh) flash(tile);
  }
  const free = told.use.size >= Number.MAX_SAFE_INTEGER ? "" : `${number(told.use.free)} of ${number(told.use.size)} free, `;
  document.getElementById("full").textContent = `${free}${fullness(told.use)} taken`;
  document.getElementById("legend").replaceChildren(legend(told.use));
  const items = grid_items();
  if (items.length && !items.some((each) => each.tabIndex === 0)) items[0].tabIndex = 0;
}

function flash(element) {
  element.classList.remove("changed");
  void element.offsetWidth; // so that the animation begins anew
  element.classList.add("changed");
}

const grid_items = () => [...main.querySelectorAll(".cell, .block")];

function move(event) {
  const item = event.target.closest?.(".cell, .block");
  if (!item) return;
  const items = grid_items();
  const at = items.indexOf(item);
  const grid = item.closest("[role=grid]");
  const columns = Number(grid.style.getPropertyValue("--columns")) || Math.max(1, getComputedStyle(grid).gridTemplateColumns.split(" ").length);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + columns, ArrowUp: at - columns, Home: at - (at % columns), End: Math.min(items.length - 1, at - (at % columns) + columns - 1), PageDown: at + 4 * columns, PageUp: at - 4 * columns }[event.key];
  if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  if (items[to]) focus_item(items[to]);
}

function focus_item(item) {
  for (const each of grid_items()) each.tabIndex = each === item ? 0 : -1;
  item.focus();
}

function peek(event) {
  const cell = event.target.closest?.(".cell");
  const line = document.getElementById("peek");
  if (!cell || !line || peeked === cell.title) return;
  peeked = cell.title;
  line.textContent = cell.title;
}

function choose(address) {
  const [, segment, subnet] = route.parts;
  history.replaceState(null, "", address ? link("map", segment, subnet, address) : link("map", segment, subnet));
  read_route();
  if (!address) {
    show_detail(null);
    for (const cell of main.querySelectorAll(".cell")) cell.setAttribute("aria-selected", "false");
  }
  refresh();
}

function show_detail(told) {
  const place = document.getElementById("detail");
  if (!place) return;
  document.getElementById("place").classList.toggle("chosen", Boolean(told));
  if (!told) {
    place.hidden = true;
    place.replaceChildren();
    return;
  }
  const opened = place.hidden || place.dataset.address !== told.address;
  place.hidden = false;
  place.dataset.address = told.address;
  draw(place, detail(told, () => leave_detail(told.address)));
  // The sheet covers the lower half of a small screen.
  if (opened && small.matches) main.querySelector(".cell[aria-selected=true]")?.scrollIntoView({ block: "start" });
}

function leave_detail(address) {
  choose("");
  const cell = main.querySelector(`[data-address="${CSS.escape(address)}"]`);
  if (cell) focus_item(cell);
}

// ------------------------------------------------------------------------------------------- what to show

function read_route() {
  const parts = location.hash.replace(/^#\/?/, "").split("/").map((each) => {
    try {
      return decodeURIComponent(each);
    } catch {
      return each;
    }
  });
  route = { name: parts[0], parts };
}

async function ask(path, parameters = {}) {
  const response = await fetch(`api/${path}?${new URLSearchParams(parameters)}`);
  const told = await response.json();
  if (!response.ok) throw Object.assign(new Error(told.error), { said: true });
  return told;
}

async function show() {
  const [name, first, second, third] = route.parts;
  if (name === "map") {
    const parameters = { segment: first, subnet: second };
    const [told, chosen] = await Promise.all([ask("map", parameters), third ? ask("address", { segment: first, address: third }) : null]);
    return [
      told,
      () => {
        map_page(told, third);
        show_detail(chosen);
      },
    ];
  }
  if (name === "address") {
    const told = await ask("address", { segment: first, address: second });
    return [
      told,
      () => {
        draw(main, detail(told));
        document.title = `${told.address} – ipam-plugin`;
      },
    ];
  }
  if (name === "search") {
    searched = Date.now();
    const told = await ask("search", { q: first });
    return [told, () => results(told)];
  }
  const told = await ask("overview");
  return [told, () => overview(told)];
}

// One question at a time; what changes meanwhile is asked once more.
async function refresh() {
  if (busy) {
    again = true;
    return;
  }
  busy = true;
  try {
    do {
      again = false;
      const asked = location.hash;
      const [told, drawing] = await show();
      if (asked === location.hash) {
        if (route.name !== "map") drawn = "";
        drawing();
        shown = told.revision;
        requestAnimationFrame(() => setTimeout(() => performance.mark("drawn"))); // for benchmarks
        main.removeAttribute("aria-busy");
      }
    } while (again);
  } catch (error) {
    drawn = "";
    if (error.said) {
      draw(main, h("p", { role: "alert" }, error.message));
      if (state) shown = state.revision; // asked again when something changes
    }
  } finally {
    busy = false;
  }
}

function tell_state(answered) {
  const old = !answered || !state || !state.connected;
  lamp.classList.toggle("old", old);
  const said = old ? "not live" : "live";
  if (lamp.textContent !== said) lamp.textContent = said; // or a screen reader would say it every second
  lamp.title = state ? `revision ${state.revision} of etcd` : "";
  const clock = (moment) => new Date(moment).toLocaleTimeString("en-GB");
  banner.hidden = !old;
  let text = "etcd has not answered yet.";
  if (!answered) text = `ipam-plugin web does not answer since ${clock(heard)}. What you see is as it was then.`;
  else if (state.loaded) text = `etcd does not answer since ${clock(state.since * SECOND)}. What you see is as it was then; containers run on.`;
  if (old && banner.textContent !== text) banner.textContent = text;
}

async function poll() {
  if (!document.hidden) {
    try {
      const told = await ask("state");
      heard = Date.now();
      state = told;
      tell_state(true);
      const waits = route.name === "search" && Date.now() - searched < SEARCH_AGAIN;
      if (told.loaded && told.revision !== shown && !waits) refresh();
    } catch {
      tell_state(false);
    }
  }
  setTimeout(poll, SECOND);
}

function navigate() {
  read_route();
  if (route.name !== "search" && document.activeElement !== query) query.value = "";
  if (route.name === "search" && document.activeElement !== query) query.value = route.parts[1] || "";
  main.setAttribute("aria-busy", "true");
  refresh();
}

let typing = 0;
query.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    const words = query.value.trim();
    const to = words ? link("search", words) : "#/";
    if (route.name === "search") history.replaceState(null, "", to);
    else if (words) history.pushState(null, "", to);
    navigate();
  }, 150);
});
document.getElementById("search").addEventListener("submit", (event) => {
  event.preventDefault();
  main.querySelector(".hits a, .hosts a")?.focus();
});
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
document.addEventListener("keydown", (event) => {
  const typed = event.target.closest?.("input");
  if (event.key === "/" && !typed && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    query.focus();
    query.select();
  } else if (event.key === "Escape" && !typed && route.name === "map" && route.parts[3]) {
    leave_detail(route.parts[3]);
  } else {
    move(event);
  }
});
main.addEventListener("click", (event) => {
  const cell = event.target.closest(".cell");
  if (!cell) return;
  focus_item(cell);
  choose(cell.dataset.address);
});
main.addEventListener("focusin", peek);
main.addEventListener("mouseover", peek);
narrow.addEventListener("change", () => refresh());
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh();
});
addEventListener("hashchange", navigate);
navigate();
poll();
