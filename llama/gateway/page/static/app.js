/** Starts the page: asks who is logged in, shows the view that the address names, and loads the model's inputs. */

import { Api } from "./gateway/api.js";
import { ChatView } from "./chat/chat.js";
import { byId } from "./common/dom.js";
import { ApiError, describe } from "./gateway/errors.js";
import { InputsView } from "./inputs/inputs_view.js";
import { askForKey, loginForm } from "./login.js";
import { dismiss, notify } from "./common/notices.js";
import { routeOf } from "./router.js";
import { readFields } from "./inputs/schema.js";
import { connectTheme } from "./theme.js";
import { UsageView } from "./usage.js";

/**
 * @typedef {import("./types.js").Session} Session
 * @typedef {import("./router.js").Route["view"]} ViewName
 */

const TITLES = { chat: "Chat", inputs: "Inputs", usage: "Usage", login: "Log in" };
const SECONDS_BETWEEN_TRIES = 2;

const api = new Api(relogin);
/** @type {Session | null} */
let session = null;

/** Ask for the key again. Another key has other chats, so the page then starts again with them. */
async function relogin() {
  if (!(await askForKey(api))) return false;
  const now = await api.session();
  if (now.key === session?.key) return true;
  location.reload();
  return false;
}

async function start() {
  connectTheme(byId("theme", HTMLSelectElement));
  byId("skip", HTMLAnchorElement).addEventListener("click", (event) => {
    event.preventDefault(); // the address after the # names the view
    byId("main", HTMLElement).focus();
  });
  byId("log-out", HTMLButtonElement).addEventListener("click", logOut);
  try {
    session = await api.session();
  } catch (error) {
    const action = { label: "Try again", run: () => location.reload() };
    return notify("session", describe(error), { action });
  }
  byId("model-name", HTMLElement).textContent = session.model;
  if (session.key === null) showLogin();
  else showPage(session, session.key);
}

function showLogin() {
  show("login");
  byId("views", HTMLElement).hidden = true;
  const form = loginForm(api, () => location.reload(), "login");
  byId("login-view", HTMLElement).append(form);
  form.querySelector("input")?.focus();
}

/**
 * @param {Session} current
 * @param {string} keyName
 */
function showPage(current, keyName) {
  byId("key-name", HTMLElement).textContent = keyName;
  byId("key-name", HTMLElement).hidden = byId("log-out", HTMLElement).hidden = !current.needs_key;
  // What the browser stores has this in its name, so that each gateway and each key finds only its own.
  const owner = [new URL(".", document.baseURI).pathname, keyName].map(encodeURIComponent).join(":");
  const chat = new ChatView(api, current, owner);
  const views = { chat, inputs: new InputsView(api, current), usage: new UsageView(api, current) };
  const open = () => {
    const route = routeOf(location.hash);
    show(route.view);
    void views[route.view].open(route.id);
  };
  addEventListener("hashchange", () => {
    const { view } = routeOf(location.hash);
    const isOther = byId(`${view}-view`, HTMLElement).hidden;
    if (isOther) dismiss("chat", "request"); // they are about the view that is being left
    open();
    if (view !== "chat") byId(`${view}-heading`, HTMLElement).focus();
  });
  open();
  void loadFields(current.model, [chat, views.inputs]);
}

/**
 * Show one view and hide the others.
 * @param {ViewName | "login"} name
 */
function show(name) {
  for (const view of ["chat", "inputs", "usage", "login"])
    byId(`${view}-view`, HTMLElement).hidden = view !== name;
  for (const link of byId("views", HTMLElement).querySelectorAll("a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${TITLES[name]} · ${session?.model ?? "Chat"}`;
}

/**
 * Load the model's inputs as soon as a server has published them.
 * @param {string} model
 * @param {{setFields: (fields: import("./inputs/schema.js").Field[]) => void}[]} users
 */
async function loadFields(model, users) {
  for (;;) {
    try {
      const schema = await api.schema(model);
      if (schema) {
        dismiss("model");
        return users.forEach((user) => user.setFields(readFields(schema)));
      }
      notify("model", "No server of the model has been ready yet. Messages wait until one is.", {
        kind: "info",
      });
    } catch (error) {
      if (!(error instanceof ApiError && error.isTemporary)) return notify("model", describe(error));
      notify("model", describe(error));
    }
    await new Promise((resolve) => setTimeout(resolve, SECONDS_BETWEEN_TRIES * 1000));
  }
}

async function logOut() {
  try {
    await api.logout();
    // The next person may have another key, for which this address would name a missing chat.
    history.replaceState(null, "", "#/chat");
    location.reload();
  } catch (error) {
    notify("session", describe(error));
  }
}

void start();
