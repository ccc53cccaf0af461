// Fetches this page every few seconds and patches <main> in place, so that scroll position, focus,
// selected text and the scrolling of tables survive, and nothing flickers.
(() => {
  "use strict";
  const root = document.documentElement;
  const period = Number(root.dataset.refreshMs);
  const link = document.getElementById("link");
  const main = document.querySelector("main");

  const patch = (old, fresh) => {
    if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
      old.replaceWith(fresh);
      return;
    }
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.data !== fresh.data) old.data = fresh.data;
      return;
    }
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name)) old.removeAttribute(name);
    }
    for (const { name, value } of [...fresh.attributes]) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    const before = [...old.childNodes];
    const after = [...fresh.childNodes];
    after.forEach((node, i) => (before[i] ? patch(before[i], node) : old.append(node)));
    before.slice(after.length).forEach((node) => node.remove());
  };

  const lost = (why) => {
    link.textContent =
      `Connection lost: ${why}. The figures are of ${main.dataset.clock}; trying again.`;
    link.hidden = false;
    main.classList.add("old");
  };

  const refresh = async () => {
    let response, text;
    try {
      // not location.href: fetch refuses an address with a user and a password in it
      response = await fetch(location.origin + location.pathname + location.search, {
        cache: "no-store",
        redirect: "error",
        signal: AbortSignal.timeout(Math.max(2 * period, 4000)),
      });
      text = await response.text();
    } catch (error) {
      const late = error.name === "TimeoutError";
      return lost(late ? "no answer in time" : "the server does not answer");
    }
    if (response.status === 401 || response.status === 403) {
      return lost(`the server refuses this page (status ${response.status}); load it again`);
    }
    if (!response.ok) return lost(`the server answers with status ${response.status}`);
    // <main> alone: a parsed style sheet of the new page would break this page's policy
    const at = text.indexOf("<main");
    const part = at < 0 ? "" : text.slice(at, text.indexOf("</main>"));
    const fresh = new DOMParser().parseFromString(part, "text/html").querySelector("main");
    if (!fresh) return lost("the answer is no dashboard");
    // a newer server may need another style sheet and script
    if (fresh.dataset.version !== main.dataset.version) return location.reload();
    link.hidden = true;
    patch(main, fresh);
    document.title = main.dataset.title;
  };

  const loop = async () => {
    if (!document.hidden) await refresh();
    setTimeout(loop, period);
  };
  setTimeout(loop, period);
})();
