"use strict";
// Turns the molecules of a report by mouse, touch and arrow keys. The page's own drawing is taken over: a ball has its
// position in data-at (picometres; y points up, z at the reader), a half stick the two balls it joins in data-ends.
(() => {
  const STEP = Math.PI / 18; // of an arrow key
  const PER_PIXEL = 0.01;
  const SWING = { angle: 0.45, milliseconds: 2600 };
  const TURNS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const UNTURNED = [1, 0, 0, 0, 1, 0, 0, 0, 1];

  const numbers = (text) => text.split(" ").map(Number);
  const apply = (m, [x, y, z]) => [0, 3, 6].map((row) => m[row] * x + m[row + 1] * y + m[row + 2] * z);

  /** The matrix m, then turned by a about the vertical and by b about the horizontal axis (radians). */
  function turned(m, a, b) {
    const [ca, sa, cb, sb] = [Math.cos(a), Math.sin(a), Math.cos(b), Math.sin(b)];
    const by = [ca, 0, sa, sa * sb, cb, -ca * sb, -sa * cb, sb, ca * cb];
    const columns = [0, 1, 2].map((k) => apply(by, [m[k], m[3 + k], m[6 + k]]));
    return [0, 1, 2].flatMap((row) => columns.map((column) => column[row]));
  }

  /** One drawing: returns what draws it anew under a rotation. */
  function drawing(svg) {
    const [eye, reach, width, tucked] = ["eye", "reach", "stick", "tucked"].map((key) => Number(svg.dataset[key]));
    const balls = [...svg.querySelectorAll(".ball")].map((element) => ({
      element,
      at: numbers(element.dataset.at),
      radius: Number(element.querySelector("circle").getAttribute("r")),
    }));
    const sticks = [...svg.querySelectorAll(".stick")].map((element) => ({ element, ends: numbers(element.dataset.ends) }));
    const byAtom = Object.fromEntries(balls.map((ball) => [ball.element.dataset.atom, ball]));

    const scale = (z) => eye / (eye - z);
    const project = ([x, y, z]) => [x * scale(z), -y * scale(z)];
    const place = (item, z) => {
      item.depth = z;
      item.element.style.setProperty("--depth", ((reach - z) / (2 * reach)).toFixed(2));
    };
    return (rotation) => {
      for (const ball of balls) {
        ball.now = apply(rotation, ball.at);
        const [x, y] = project(ball.now);
        const size = scale(ball.now[2]).toFixed(3);
        ball.element.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)}) scale(${size})`);
        place(ball, ball.now[2]);
      }
      for (const stick of sticks) {
        const [near, far] = stick.ends.map((k) => byAtom[k]);
        const along = far.now.map((value, k) => value - near.now[k]);
        const begin = Math.min(0.5, (tucked * near.radius) / Math.hypot(...along));
        const at = (share) => near.now.map((value, k) => value + share * along[k]);
        const z = near.now[2] + along[2] / 4;
        [project(at(begin)), project(at(0.5))].forEach(([x, y], k) => {
          stick.element.setAttribute(`x${k + 1}`, x.toFixed(1));
          stick.element.setAttribute(`y${k + 1}`, y.toFixed(1));
        });
        stick.element.setAttribute("stroke-width", (width * scale(z)).toFixed(1));
        place(stick, z);
      }
      // what is far is drawn first
      svg.append(...[...balls, ...sticks].sort((a, b) => a.depth - b.depth).map((item) => item.element));
    };
  }

  /** The drawings of one figure turn together. */
  function stage(panels) {
    const drawings = [...panels.querySelectorAll("svg")].map(drawing);
    let rotation = UNTURNED;
    let waiting = false;
    let swinging = false;
    let held = null;

    const draw = () => drawings.forEach((redraw) => redraw(rotation));
    const show = (m) => {
      swinging = false;
      rotation = m;
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        draw();
      });
    };
    const turn = (a, b) => show(turned(rotation, a, b));

    panels.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      held = [event.clientX, event.clientY];
      panels.setPointerCapture(event.pointerId);
    });
    panels.addEventListener("pointermove", (event) => {
      if (held === null) return;
      turn(PER_PIXEL * (event.clientX - held[0]), PER_PIXEL * (event.clientY - held[1]));
      held = [event.clientX, event.clientY];
    });
    for (const end of ["pointerup", "pointercancel"]) panels.addEventListener(end, () => (held = null));
    panels.addEventListener("dblclick", () => show(UNTURNED));
    panels.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      if (event.key === "Home") show(UNTURNED);
      else if (event.key in TURNS) turn(...TURNS[event.key].map((sense) => sense * STEP));
      else return;
      event.preventDefault(); // the page stays where it is
    });

    panels.classList.add("live");
    panels.tabIndex = 0;
    panels.setAttribute("role", "application");
    panels.setAttribute("aria-roledescription", "three-dimensional view");
    panels.nextElementSibling.hidden = false; // how it is turned
    draw();

    // one swing to and fro, when it first comes into sight, says that it can be turned
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    new IntersectionObserver((entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      swinging = true;
      const from = rotation;
      const start = performance.now();
      requestAnimationFrame(function swing(now) {
        if (!swinging) return;
        const share = Math.min(1, Math.max(0, (now - start) / SWING.milliseconds));
        rotation = turned(from, SWING.angle * Math.sin(2 * Math.PI * share) * (1 - share), 0);
        draw();
        if (share < 1) requestAnimationFrame(swing);
      });
    }, { threshold: 0.6 }).observe(panels);
  }

  document.querySelectorAll(".panels").forEach(stage);
})();
