// Small helpers that build the widgets' elements. Text is inserted as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value != null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** An HTML element; attributes such as "onclick" are listeners. */
export const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/** "M x y L x y ..." through points [[x, y], ...]. */
export const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * Puts `element` on a node as its last widget, in both renderers. It has no value, so nothing is saved or queued.
 * Returns the widget and a function `resize` that sets its minimum height in pixels of the graph.
 */
export function addPanel(node, name, element, height) {
  let least = height;
  const setHeight = (pixels) => {
    least = pixels;
    // The canvas renderer sizes the element, without its margin; in the other renderer it sizes itself.
    element.style.minHeight = `${pixels - 2 * MARGIN}px`;
  };
  setHeight(height);
  const widget = node.addDOMWidget(name, name, element, {
    serialize: false, hideOnZoom: false, margin: MARGIN, getMinHeight: () => least, getMaxHeight: () => least * 3,
  });
  widget.serialize = false;
  for (const kind of ["pointerdown", "dblclick", "contextmenu", "keydown", "keyup", "copy", "paste", "cut"]) {
    element.addEventListener(kind, (event) => event.stopPropagation());
  }
  const resize = (pixels) => {
    if (pixels === least) return;
    const shrunk = Math.min(pixels - least, 0); // shrinks the node by the freed height
    setHeight(pixels);
    const [width, wanted] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(wanted, node.size[1] + shrunk)]);
    node.setDirtyCanvas?.(true, true);
  };
  return { widget, resize };
}

const MARGIN = 8;
