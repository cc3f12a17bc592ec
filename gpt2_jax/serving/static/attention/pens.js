// Two pens with the same strokes: one draws on a canvas, the other writes an SVG file.

const FONT = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace';
const MOST = 8192;  // pixels that every browser's canvas may be high

export class CanvasPen {
  constructor(canvas, width, height) {
    const scale = Math.min(devicePixelRatio || 1, MOST / Math.max(width, height, 1));
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    this.context = canvas.getContext('2d');
    this.context.scale(scale, scale);
  }

  curve(x0, y0, x1, y1, colour, alpha, width) {
    const [c, middle] = [this.context, (x0 + x1) / 2];
    c.globalAlpha = alpha;
    c.strokeStyle = colour;
    c.lineWidth = width;
    c.beginPath();
    c.moveTo(x0, y0);
    c.bezierCurveTo(middle, y0, middle, y1, x1, y1);
    c.stroke();
  }

  rect(x, y, width, height, colour, alpha = 1) {
    this.context.globalAlpha = alpha;
    this.context.fillStyle = colour;
    this.context.fillRect(x, y, width, height);
  }

  // A lower triangle of T rows; alpha(t, s) of each cell. One picture, as there may be 30,000 of them.
  cells(x, y, cell, T, alpha, colour) {
    const picture = new ImageData(T, T);
    const [r, g, b] = [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16));
    for (let t = 0; t < T; t++) {
      for (let s = 0; s <= t; s++) picture.data.set([r, g, b, 255 * alpha(t, s)], 4 * (t * T + s));
    }
    const small = new OffscreenCanvas(T, T);
    small.getContext('2d').putImageData(picture, 0, 0);
    this.context.globalAlpha = 1;
    this.context.imageSmoothingEnabled = false;
    this.context.drawImage(small, x, y, cell * T, cell * T);
    if (cell < 8) return;
    for (let i = 1; i < T; i++) {  // hairlines between large cells
      this.context.clearRect(x + i * cell - 1, y + i * cell, 1, (T - i) * cell);
      this.context.clearRect(x, y + i * cell - 1, i * cell, 1);
    }
  }

  frame(x, y, width, height, colour) {
    this.context.globalAlpha = 1;
    this.context.strokeStyle = colour;
    this.context.lineWidth = 1;
    this.context.strokeRect(x, y, width, height);
  }

  text(x, y, text, colour, { anchor = 'start', size = 12, upwards = false } = {}) {
    const c = this.context;
    c.save();
    c.globalAlpha = 1;
    c.fillStyle = colour;
    c.font = `${size}px ${FONT}`;
    c.textAlign = anchor === 'end' ? 'right' : 'left';
    c.textBaseline = 'middle';
    c.translate(x, y);
    if (upwards) c.rotate(-Math.PI / 2);
    c.fillText(text, 0, 0);
    c.restore();
  }
}

export class SvgPen {
  constructor(width, height, title) {
    this.root = this.#add(null, 'svg', { width, height, viewBox: `0 0 ${width} ${height}`, role: 'img', 'font-family': FONT });
    this.#add(this.root, 'title', {}).textContent = clean(title);
    this.rect(0, 0, width, height, '#ffffff');
  }

  #add(parent, tag, attributes) {
    const made = document.createElementNS('http://www.w3.org/2000/svg', tag);
    for (const [name, value] of Object.entries(attributes)) {
      made.setAttribute(name, typeof value === 'number' ? Math.round(value * 1000) / 1000 : value);
    }
    parent?.append(made);
    return made;
  }

  curve(x0, y0, x1, y1, colour, alpha, width) {
    const middle = (x0 + x1) / 2;
    this.#add(this.root, 'path', {
      d: `M${x0} ${y0}C${middle} ${y0} ${middle} ${y1} ${x1} ${y1}`, fill: 'none', stroke: colour,
      'stroke-opacity': alpha, 'stroke-width': width });
  }

  rect(x, y, width, height, colour, alpha = 1) {
    this.#add(this.root, 'rect', { x, y, width, height, fill: colour, 'fill-opacity': alpha });
  }

  cells(x, y, cell, T, alpha, colour) {
    for (let t = 0; t < T; t++) {
      for (let s = 0; s <= t; s++) {
        if (alpha(t, s)) this.rect(x + s * cell, y + t * cell, cell, cell, colour, alpha(t, s));
      }
    }
  }

  frame(x, y, width, height, colour) {
    this.#add(this.root, 'rect', { x, y, width, height, fill: 'none', stroke: colour });
  }

  text(x, y, text, colour, { anchor = 'start', size = 12, upwards = false } = {}) {
    const turn = upwards ? { transform: `rotate(-90 ${x} ${y})` } : {};
    this.#add(this.root, 'text', { x, y, fill: colour, 'font-size': size, 'text-anchor': anchor,
      'dominant-baseline': 'central', ...turn }).textContent = clean(text);
  }

  toString() { return new XMLSerializer().serializeToString(this.root); }
}

// XML has no place for these two, even escaped; control characters were made visible before.
const clean = text => text.replace(/[\ufffe\uffff]/g, '\ufffd').toWellFormed();
