// The slide in OpenSeadragon: tiles, one overlay, scale bar, the square of the last query, mouse and keys.
// Places are level-0 pixels.
import { makeHeaders, showError } from "./api.js";
import { find, formatLength, formatNumber, formatWhole, make } from "./dom.js";

const OSD = window.OpenSeadragon;
const WIDEST_BAR = 140; // screen pixels
const STEP = 0.15; // of the view, for an arrow key

// OpenSeadragon adds a <style> unless one stands there, and the page's security policy refuses it. This is none that a
// browser would read, as it is not HTML's.
function keepStyleOut() {
  const stand = document.createElementNS(null, "style");
  stand.setAttribute("data-openseadragon-mobile-css", "true");
  document.head.append(stand);
}

export class SlideViewer {
  // To be made when the stage is visible. `query(x, y)` is called with a place on the slide, `settle(id, {x, y, zoom})`
  // when the view has come to rest.
  constructor({ query, settle }) {
    keepStyleOut();
    this.query = query;
    this.settle = settle;
    this.slide = null;
    this.overlay = null;
    this.square = null;
    this.opacity = 1;
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.osd = OSD({
      element: find("viewer"),
      drawer: "canvas", // the one drawer that lets one image be drawn without smoothing
      showNavigationControl: false,
      loadTilesWithAjax: true,
      ajaxHeaders: makeHeaders(),
      animationTime: calm ? 0 : 0.6,
      smoothTileEdgesMinZoom: Infinity,
      autoResize: false,
      preserveImageSizeOnResize: true,
      maxZoomPixelRatio: 4,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: false },
      gestureSettingsTouch: { clickToZoom: false, dblClickToZoom: false },
      gestureSettingsPen: { clickToZoom: false, dblClickToZoom: false },
    });
    this.osd.addHandler("tile-drawing", ({ context, tiledImage }) => {
      context.imageSmoothingEnabled = tiledImage !== this.overlay;
    });
    this.osd.addHandler("canvas-click", (event) => event.quick && this._queryPoint(event.position));
    this.osd.addHandler("canvas-key", (event) => this._pressKey(event));
    this.osd.addHandler("update-viewport", () => this._drawScale());
    this.osd.addHandler("animation-finish", () => this._settle());
    this.osd.addHandler("tile-load-failed", ({ tileRequest }) => {
      // Without a status it was only given up, as the view moved on.
      if (tileRequest?.status)
        showError(new Error("A part of the slide or of its overlay cannot be read, and stays empty."));
    });
    this._describeCanvas();
    // The stage has no size while another view is shown, from which OpenSeadragon would not recover.
    new ResizeObserver(() => find("stage").clientWidth && this.osd.forceResize()).observe(find("stage"));
    find("zoom-in").addEventListener("click", () => this._zoom(1.5));
    find("zoom-out").addEventListener("click", () => this._zoom(1 / 1.5));
    find("zoom-home").addEventListener("click", () => this._showWhole());
    find("query-middle").addEventListener("click", () => this.queryMiddle());
  }

  _describeCanvas() {
    const canvas = this.osd.canvas;
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", "Slide");
    canvas.setAttribute("aria-describedby", "keys");
  }

  // Show a slide whole, or at {x, y, zoom}, of which zoom is screen pixels a slide's pixel.
  open(slide, path, view) {
    this.slide = null;
    this.overlay = this.square = null;
    this.osd.canvas.setAttribute("aria-label", `Slide ${slide.name}`);
    const tileSource = {
      width: slide.width,
      height: slide.height,
      tileSize: slide.tile_size,
      tileOverlap: 0,
      minLevel: 0,
      maxLevel: slide.max_level,
      getTileUrl: (level, column, row) => `${path}/tiles/${level}/${column}_${row}.jpg`,
    };
    this.opening = slide;
    return new Promise((resolve, reject) => {
      this.osd.addOnceHandler("open", () => {
        // Another slide was opened in between, of which this event is.
        if (this.opening === slide) {
          this.slide = slide;
          if (view) this.moveTo(view.x, view.y, view.zoom, true);
          this._settle();
        }
        resolve();
      });
      this.osd.addOnceHandler("open-failed", ({ message }) => reject(new Error(message)));
      this.osd.open(tileSource);
    });
  }

  get image() {
    return this.osd.world.getItemAt(0);
  }

  // Put an overlay {x, y, width, height} of the picture at `url` over the slide; without one, take the last away.
  showOverlay(overlay, url) {
    if (this.overlay) this.osd.world.removeItem(this.overlay);
    this.overlay = null;
    const wanted = (this.wanted = overlay && url);
    if (!overlay) return;
    const { x, y, width, height } = overlay;
    const where = this.image.imageToViewportRectangle(x, y, width, height);
    this.osd.addTiledImage({
      // One tile of any number of pixels, which OpenSeadragon stretches.
      tileSource: {
        width,
        height,
        tileWidth: width,
        tileHeight: height,
        minLevel: 0,
        maxLevel: 0,
        getTileUrl: () => url,
      },
      x: where.x,
      y: where.y,
      width: where.width,
      success: ({ item }) => {
        // Another one was chosen in the meantime.
        if (this.wanted !== wanted) {
          this.osd.world.removeItem(item);
          return;
        }
        this.overlay = item;
        item.setOpacity(this.opacity);
      },
    });
  }

  setOpacity(opacity) {
    this.opacity = opacity;
    this.overlay?.setOpacity(opacity);
  }

  markSquare(x, y, side) {
    if (this.square) this.osd.removeOverlay(this.square);
    this.square = make("div", { class: "square", "aria-hidden": "true" });
    const where = this.image.imageToViewportRectangle(x, y, side, side);
    this.osd.addOverlay({ element: this.square, location: where });
  }

  moveTo(x, y, zoom = null, immediately = false) {
    const viewport = this.osd.viewport;
    if (zoom) viewport.zoomTo(this.image.imageToViewportZoom(zoom), undefined, immediately);
    viewport.panTo(this.image.imageToViewportCoordinates(x, y), immediately);
    viewport.applyConstraints(immediately);
  }

  // Middle and zoom of the view, as it will be at rest.
  readView() {
    const { x, y } = this.image.viewportToImageCoordinates(this.osd.viewport.getCenter(false));
    return { x, y, zoom: this.image.viewportToImageZoom(this.osd.viewport.getZoom(false)) };
  }

  queryMiddle() {
    const { x, y } = this.readView();
    this._queryPlace(x, y);
  }

  _queryPoint(position) {
    const point = this.image.viewportToImageCoordinates(this.osd.viewport.pointFromPixel(position, true));
    this._queryPlace(point.x, point.y);
  }

  _queryPlace(x, y) {
    if (!this.slide || x < 0 || y < 0 || x >= this.slide.width || y >= this.slide.height) return;
    this.query(Math.round(x), Math.round(y));
  }

  // OpenSeadragon's home would be as wide as the overlay, too.
  _showWhole() {
    this.osd.viewport.fitBounds(this.image.getBounds());
  }

  _zoom(factor) {
    this.osd.viewport.zoomBy(factor);
    this.osd.viewport.applyConstraints();
  }

  _pan(right, down) {
    const bounds = this.osd.viewport.getBounds();
    this.osd.viewport.panBy(new OSD.Point(right * STEP * bounds.width, down * STEP * bounds.height));
    this.osd.viewport.applyConstraints();
  }

  // All keys are handled here: OpenSeadragon goes by the place of a key on a keyboard of the USA.
  _pressKey(event) {
    const { key, ctrlKey, altKey, metaKey } = event.originalEvent;
    event.preventDefaultAction = true;
    const actions = {
      Enter: () => this.queryMiddle(),
      ArrowLeft: () => this._pan(-1, 0),
      ArrowRight: () => this._pan(1, 0),
      ArrowUp: () => this._pan(0, -1),
      ArrowDown: () => this._pan(0, 1),
      "+": () => this._zoom(1.5),
      "=": () => this._zoom(1.5),
      "-": () => this._zoom(1 / 1.5),
      0: () => this._showWhole(),
      Home: () => this._showWhole(),
    };
    if (!this.slide || ctrlKey || altKey || metaKey || !Object.hasOwn(actions, key)) return;
    event.originalEvent.preventDefault();
    actions[key]();
  }

  _drawScale() {
    if (!this.slide) return;
    const zoom = this.image.viewportToImageZoom(this.osd.viewport.getZoom(true));
    const pixel = this.slide.mpp / zoom; // um of a screen pixel
    const power = 10 ** Math.floor(Math.log10(WIDEST_BAR * pixel));
    const length = [5, 2, 1].map((digit) => digit * power).find((one) => one <= WIDEST_BAR * pixel);
    find("scale-bar").style.width = `${length / pixel}px`;
    find("scale-text").textContent = formatLength(length);
  }

  _settle() {
    if (!this.slide) return;
    this._drawScale();
    const { x, y, zoom } = this.readView();
    const mpp = this.slide.mpp;
    find("place").textContent =
      `Middle of the view: ${formatWhole(x)}, ${formatWhole(y)} px (${formatLength(x * mpp)}, ` +
      `${formatLength(y * mpp)}); ${formatNumber(mpp / zoom)} µm a screen pixel.`;
    this.settle(this.slide.id, { x, y, zoom });
  }
}
