// Reads the array `counts` of an .npz trace (a zip file of .npy files) without any dependency.
'use strict'

const fs = require('node:fs')
const zlib = require('node:zlib')

const END_OF_DIRECTORY = 0x06054b50

function member (archive, wanted) {
  let end = archive.length - 22
  while (end >= 0 && archive.readUInt32LE(end) !== END_OF_DIRECTORY) end--
  if (end < 0) throw new Error('not an .npz file')
  let entry = archive.readUInt32LE(end + 16)
  for (let left = archive.readUInt16LE(end + 10); left > 0; left--) {
    const method = archive.readUInt16LE(entry + 10)
    const size = archive.readUInt32LE(entry + 20)
    const nameLength = archive.readUInt16LE(entry + 28)
    const header = archive.readUInt32LE(entry + 42)
    const name = archive.toString('latin1', entry + 46, entry + 46 + nameLength)
    if (name === wanted) {
      const start = header + 30 + archive.readUInt16LE(header + 26) + archive.readUInt16LE(header + 28)
      const data = archive.subarray(start, start + size)
      return method === 0 ? data : zlib.inflateRawSync(data)
    }
    entry += 46 + nameLength + archive.readUInt16LE(entry + 30) + archive.readUInt16LE(entry + 32)
  }
  throw new Error(`no ${wanted} in the file`)
}

// {shape, data}: the counts as int32, little-endian, in C order.
function counts (path) {
  const npy = member(fs.readFileSync(path), 'counts.npy')
  const long = npy[6] >= 2
  const start = (long ? 12 : 10) + (long ? npy.readUInt32LE(8) : npy.readUInt16LE(8))
  const header = npy.toString('latin1', long ? 12 : 10, start)
  const [, bytes] = /'descr': '[<|][iu]([1248])'/.exec(header) || []
  if (!bytes || /'fortran_order': True/.test(header)) throw new Error(`counts must be integers in C order: ${header}`)
  const shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(',').filter(part => part.trim()).map(Number)
  if (shape.length !== 4) throw new Error('counts must be [step, layer, source, expert]')
  const data = Buffer.alloc((npy.length - start) / bytes * 4)
  for (let from = start, to = 0; from < npy.length; from += Number(bytes), to += 4) {
    data.writeInt32LE(npy.readUIntLE(from, Math.min(bytes, 6)), to) // throws where a count does not fit
  }
  return { shape, data }
}

module.exports = { counts }
