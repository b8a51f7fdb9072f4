// Helps the hand: keys, what a token was, dark and light, and a word when there is something new. Pages work without it.
"use strict";

const byId = (id) => document.getElementById(id);

// Keys: every link or button that says data-key is pressed by it.
function rows() {
  return [...document.querySelectorAll("a.row")];
}

function step(direction) {
  const all = rows();
  if (all.length === 0) return;
  const now = all.indexOf(document.activeElement);
  const next = now < 0 ? (direction > 0 ? 0 : all.length - 1) : Math.min(all.length - 1, Math.max(0, now + direction));
  all[next].focus();
}

function unfold() {
  const calls = [...document.querySelectorAll("details.call")];
  const open = calls.some((call) => !call.open);
  for (const call of calls) call.open = open;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea, dialog[open]")) return;
  const target = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (target) target.click();
  else if (event.key === "j") step(1);
  else if (event.key === "k") step(-1);
  else if (event.key === "e") unfold();
  else if (event.key === "f") document.querySelector(".filters input, .filters select")?.focus();
  else return;
  event.preventDefault();
});

byId("help-open").addEventListener("click", () => byId("help").showModal());

// Dark and light: a cookie, so that the server already sends the right page.
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
  root.dataset.theme = theme;
  document.cookie = `theme=${theme}; path=/; max-age=31536000; samesite=lax`;
});

// Tokens: probability and advantage, by pointer or by arrow keys.
const tip = byId("tip");

function tell(token) {
  document.querySelector(".t.now")?.classList.remove("now");
  tip.hidden = !token;
  if (!token) return;
  token.classList.add("now");
  const { at, p, l } = token.dataset;
  const advantage = token.parentElement.dataset.advantage;
  tip.textContent =
    `token ${at} ${JSON.stringify(token.textContent)}: probability ${p}, logprob ${l}` +
    (advantage ? `, advantage ${advantage}` : ", no advantage");
  const box = token.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${box.bottom + tip.offsetHeight + 8 > innerHeight ? box.top - tip.offsetHeight - 4 : box.bottom + 4}px`;
}

document.addEventListener("pointerover", (event) => {
  const token = event.target.closest?.(".t") ?? null;
  // Scrolling moves text under a resting pointer: who walks by arrow keys must not lose the place.
  if (token || !document.activeElement.closest(".tokens")) tell(token);
});
document.addEventListener("focusout", () => tell(null));
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
document.addEventListener("keydown", (event) => {
  const text = event.target.closest?.(".tokens");
  const direction = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!text || !direction) return;
  const tokens = [...text.querySelectorAll(".t")];
  const now = tokens.findIndex((token) => token.classList.contains("now"));
  tell(tokens[Math.min(tokens.length - 1, Math.max(0, now + direction))]);
  event.preventDefault();
});

// What is new: the index goes on while pages are looked at.
const status = byId("status");

async function look() {
  const answer = await fetch(status.dataset.url, { headers: { Accept: "application/json" } }).catch(() => null);
  if (!answer?.ok) return;
  const { percent, state } = await answer.json();
  if (percent < 100) status.textContent = `indexed ${percent} %`;
  else if (state === status.dataset.state) status.textContent = "";
  else if (!status.querySelector("a")) {
    const link = document.createElement("a");
    link.href = location.href;
    link.textContent = "new data: reload";
    status.replaceChildren(link);
  }
}

setInterval(() => { if (!document.hidden) look(); }, 3000);
