"The board's script and the desk's detect as a user starts them: a proof of a .rknn, a network camera that breaks, a hung NPU"
import json
import socketserver
import struct
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import cv2
import numpy as np
import pytest
from yolov9001 import workbook
from yolov9001.cli import main
from yolov9001.core import InputError
from yolov9001.data.dataset import make_digits
from yolov9001.npu import board
from yolov9001.npu.board import LiveSource, load_recording, save_recording
from yolov9001.rk3588_bench import simulate_rknn, toolkit_version



def script(*words): return subprocess.run([sys.executable, '-I', board.__file__, *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope='module')
def proof(tmp_path_factory):
    "A tiny run, and the recording of what a board must answer to its model.rknn"
    if toolkit_version() is None: pytest.skip('rknn-toolkit2 is not installed')
    folder = tmp_path_factory.mktemp('board')
    data, run = make_digits(folder/'digits', train=8, val=4), folder/'run'
    knobs = [word for knob in ('input_size=96x128', 'epochs=1', 'batch_size=4', 'device=cpu') for word in ('-p', knob)]
    assert main(['train', '--data', str(data), '--out', str(run), *knobs]) == 0
    assert main(['quantize', str(run), '-p', 'qat_epochs=0']) == 0
    assert main(['val', str(run/'model.rknn'), '--data', str(data), '--record', str(folder/'proof.npz'), '--images', '3']) == 0
    return folder


def test_a_rknn_on_a_desk_is_its_onnx_file_simulated(proof, capfd):
    assert main(['val', str(proof/'run'/'model.rknn'), '--data', str(proof/'digits')]) == 0
    said = capfd.readouterr()
    assert 'simulated from model_int8.onnx' in said.err and 'on 4 images' in said.out
    ap = json.loads((proof/'run'/'metrics.json').read_text())['map_int8_ptq']
    assert f'AP {ap:.1f}' in said.out


def test_a_rknn_without_its_onnx_file_is_refused(proof, tmp_path, capfd):
    for name in ('model.rknn', 'model.rknn.json'): (tmp_path/name).write_bytes((proof/'run'/name).read_bytes())
    with pytest.raises(InputError, match='model_int8.onnx that it was made from, which is missing'): simulate_rknn(tmp_path/'model.rknn')
    (tmp_path/'model_int8.onnx').write_bytes((proof/'run'/'model.onnx').read_bytes())
    assert main(['val', str(tmp_path/'model.rknn'), '--data', str(proof/'digits')]) == 2
    assert 'which has changed' in capfd.readouterr().err
    (tmp_path/'model.rknn').write_bytes(b'another')
    assert main(['detect', str(tmp_path/'model.rknn'), str(proof/'digits'/'images')]) == 2


def test_the_board_proves_what_was_recorded(proof, tmp_path):
    model, recording = proof/'run'/'model.rknn', load_recording(proof/'proof.npz')
    assert len(recording.images) == 3 and recording.seconds > 0 and len(recording.object_boxes) > 3
    good = script(model, '--verify', proof/'proof.npz', '--replay', proof/'proof.npz', '--json', tmp_path/'numbers.json')
    assert good.returncode == 0 and 'the board computes what the simulator computes: 100.000 %' in good.stdout
    assert json.loads((tmp_path/'numbers.json').read_text())['outputs']['cls_32'] == dict(equal=100, largest=0)
    save_recording(recording._replace(outputs=[*recording.outputs[:5], recording.outputs[5] ^ 1]), tmp_path/'off.npz')
    bad = script(model, '--verify', proof/'proof.npz', '--replay', tmp_path/'off.npz')
    assert bad.returncode == 1 and 'THE BOARD DIFFERS' in bad.stdout and 'worst cls_32 0.000 %' in bad.stdout


@pytest.mark.parametrize('differs, code', [(False, 0), (True, 1)])
def test_val_over_the_network(proof, monkeypatch, capfd, differs, code):
    "The simulator in the place of the board: what is asked, what is said, and the exit code"
    class Board:
        def __init__(self, board): assert board == 'board.local'
        def __enter__(self): return self
        def __exit__(self, *_): self.npu.close()
        def load_rknn(self, path): self.npu = simulate_rknn(path)
        def __call__(self, image): return [output + differs*3/255 for output in self.npu(image)]
    monkeypatch.setattr(workbook, 'Npu', Board)
    words = ['val', str(proof/'run'/'model.rknn'), '--data', str(proof/'digits'), '--board', 'board.local', '--images', '2']
    assert main(words) == code
    assert ('THE BOARD DIFFERS' if differs else 'the board computes what') in capfd.readouterr().out


def test_what_cannot_be_proved_is_one_line(proof, capfd):
    assert main(['val', str(proof/'run'/'model.onnx'), '--data', str(proof/'digits'), '--record', str(proof/'x.npz')]) == 2
    assert main(['val', str(proof/'run'/'model.rknn'), '--data', str(proof/'digits'), '--record', str(proof/'x.npz'), '--images', '0']) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert 'no .rknn' in said[0] and 'at least 1' in said[-1] and not (proof/'x.npz').exists()


def test_detect_in_a_video_with_int8_files(proof, tmp_path, capfd):
    film = cv2.VideoWriter(str(tmp_path/'film.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 5, (320, 240))
    for file in sorted((proof/'digits'/'images').iterdir())[:5]: film.write(cv2.imread(str(file)))
    film.release()
    for name in ('model_int8.onnx', 'model.rknn'):
        assert main(['detect', str(proof/'run'/name), str(tmp_path/'film.avi'), '--out', str(tmp_path/name)]) == 0
        assert len((tmp_path/name/'detections.jsonl').read_text().splitlines()) == 5
        assert cv2.VideoCapture(str(tmp_path/name/'video.mp4')).get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert '"frames_per_s"' in capfd.readouterr().out
    assert main(['detect', str(proof/'run'/'model_int8.onnx'), str(tmp_path/'none.mp4')]) == 2


def test_tracking_says_what_it_needs_or_numbers_objects(proof, tmp_path, capfd):
    code = 0 if find_spec('supervision') else 2
    film = cv2.VideoWriter(str(tmp_path/'film.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 5, (320, 240))
    for _ in range(3): film.write(np.zeros((240, 320, 3), np.uint8))
    film.release()
    words = ['detect', str(proof/'run'/'model_int8.onnx'), str(tmp_path/'film.avi'), '--out', str(tmp_path/'out'), '--track']
    assert main(words) == code
    assert code == 0 or "pip install -e '.[track]'" in capfd.readouterr().err
    assert main([*words[:2], str(proof/'digits'/'images'), '--track']) == 2


def jpeg_parts(image):
    "Quantization tables and scan of a baseline JPEG, as RFC 2435 sends them"
    data = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    tables, place = b'', 2
    while data[place + 1] != 0xda:
        length = struct.unpack_from('>H', data, place + 2)[0]
        if data[place + 1] == 0xdb: tables += b''.join(data[place + start + 1:place + start + 65] for start in range(4, length, 65))
        place += 2 + length
    return tables, data[place + 2 + struct.unpack_from('>H', data, place + 2)[0]:-2]


class Camera(socketserver.StreamRequestHandler):
    "A network camera: RTSP, with JPEG pictures over the same connection, that hangs up after 30 frames"
    replies = dict(OPTIONS='Public: DESCRIBE, SETUP, PLAY\r\n', SETUP='Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n')

    def handle(self):
        while request := self.rfile.readline().decode():
            headers = dict(line.split(': ', 1) for line in iter(lambda: self.rfile.readline().decode().strip(), ''))
            word, body = request.split()[0], ''
            head = f"RTSP/1.0 200 OK\r\nCSeq: {headers['CSeq']}\r\nSession: 1\r\n{self.replies.get(word, '')}"
            if word == 'DESCRIBE':
                body = 'v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 26\r\na=control:track\r\n'
                head += f'Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n'
            self.wfile.write(f'{head}\r\n{body}'.encode())
            if word == 'PLAY': return self.play()

    def play(self):
        packets = 0
        for number in range(30):
            image = np.full((240, 320, 3), 60, np.uint8)
            image[60:160, 5*number:5*number + 60] = 40, 40, 220
            tables, scan = jpeg_parts(image)
            for offset in range(0, len(scan), 1200):
                last = offset + 1200 >= len(scan)
                head = struct.pack('>BBHII', 0x80, 26 | last << 7, packets, number*3600, 1)
                kind = struct.pack('>IBBBB', offset, 1, 255, 320//8, 240//8)
                if not offset: kind += struct.pack('>HH', 0, len(tables)) + tables
                packet = head + kind + scan[offset:offset + 1200]
                self.wfile.write(struct.pack('>BBH', 0x24, 0, len(packet)) + packet)
                packets += 1
            time.sleep(.04)


@pytest.fixture
def camera():
    server = socketserver.ThreadingTCPServer(('127.0.0.1', 0), Camera)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'rtsp://127.0.0.1:{server.server_address[1]}/stream'
    server.shutdown()


def test_a_network_camera_is_read_dropped_and_opened_again(camera):
    live, seen = LiveSource(camera, patience=30, pause=.1), []
    for name, image in live:
        seen.append(name)
        if len(seen) == 3:          # colours and place came through
            assert image.shape == (240, 320, 3) and image[110].max(0)[0] > 180 > 120 > image[110].max(0)[2]
        time.sleep(.15)
        if live.reconnects and live.dropped and len(seen) > 12: break
    live.close()
    assert seen == sorted(set(seen))


def test_detect_in_a_network_camera(camera, tmp_path):
    from yolov9001.npu.video import watch_video
    def nothing(image): return [np.zeros((1, c, 96//s, 128//s)) for s in (8, 16, 32) for c in (4, 1)]
    numbers = watch_video(nothing, camera, (96, 128), ['red'], tmp_path, frames=40)
    assert numbers['frames'] == 40 and numbers['reconnects'] > 0
    assert len((tmp_path/'detections.jsonl').read_text().splitlines()) == 40


def test_a_hung_npu_is_named_and_the_script_ends(proof, tmp_path):
    hung = tmp_path/'rknnlite'
    hung.mkdir()
    (hung/'__init__.py').write_text('')
    (hung/'api.py').write_text('import time\nclass RKNNLite:\n    def load_rknn(self, path): return 0\n    def init_runtime(self, **_): return 0\n'
                               '    def inference(self, **_): time.sleep(600)\n    def release(self): pass\n')
    words = f'import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[0] = "board.py"; import runpy; runpy.run_path({board.__file__!r}, run_name="__main__")'
    start = time.time()
    result = subprocess.run([sys.executable, '-c', words, str(proof/'run'/'model.rknn'), '--source', str(proof/'digits'/'images'), '--timeout', '1'],
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and 'NPU core 0: no answer for 1 s' in result.stderr and time.time() - start < 60


def test_an_old_runtime_is_named_with_the_version_to_install(proof):
    card = board.read_card(str(proof/'run'/'model.rknn'))
    said = board.version_advice(card, '1.4.0', '0.8.2')
    assert f"install librknnrt {toolkit_version()} from github.com/airockchip/rknn-toolkit2" in said and 'driver 0.8.2' in said
    assert board.version_advice(card, toolkit_version()) == ''
